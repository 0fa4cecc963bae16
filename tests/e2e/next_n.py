"""
A GLM-4 mixture of experts whose next token is a fixed function of the last one, and the layer that drafts for it.

Transformers knows the released models' next-N layers only to drop them, so the module that runs one is written here.
Its experts are those of the layer with the shared one appended, as engines do it.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file
from transformers import Glm4MoeConfig, Glm4MoeForCausalLM
from transformers.masking_utils import create_causal_mask
from transformers.models.glm4_moe.modeling_glm4_moe import (
    Glm4MoeDecoderLayer,
    Glm4MoeRMSNorm,
    Glm4MoeRotaryEmbedding,
)

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

VOCABULARY, HIDDEN, LAYERS = 64, 64, 2
PREFIX = f"model.layers.{LAYERS}"


def config() -> Glm4MoeConfig:
    """Return a dense layer, one with experts, and the number of one next-N layer."""
    return Glm4MoeConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=96, moe_intermediate_size=32,
        num_hidden_layers=LAYERS, num_attention_heads=4, num_key_value_heads=2, head_dim=16, n_routed_experts=4,
        num_experts_per_tok=2,
        n_shared_experts=1, n_group=1, topk_group=1, first_k_dense_replace=1, num_nextn_predict_layers=1,
        max_position_embeddings=128, tie_word_embeddings=False, use_qk_norm=True, dtype="float32",
    )  # fmt: skip


class RoutedAndShared(torch.nn.Module):
    """A router, and experts of which the last is shared: every row goes there, with weight 1."""

    def __init__(self, router: torch.nn.Module, experts: torch.nn.Module) -> None:
        super().__init__()
        self.gate = router
        self.experts = experts

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        _, weights, ids = self.gate(x)
        rows = x.reshape(-1, x.shape[-1])
        last = torch.full_like(ids[:, :1], self.gate.num_experts)
        weights = torch.cat([weights, torch.ones_like(weights[:, :1])], dim=1)
        return self.experts(rows, weights, torch.cat([ids, last], dim=1)).view(x.shape)


class NextN(torch.nn.Module):
    """Predicts the token after next from the target's states and the next token."""

    def __init__(self, settings: Glm4MoeConfig) -> None:
        super().__init__()
        self.settings = settings
        self.embed_tokens = torch.nn.Embedding(VOCABULARY, HIDDEN)
        self.enorm, self.hnorm = Glm4MoeRMSNorm(HIDDEN), Glm4MoeRMSNorm(HIDDEN)
        self.eh_proj = torch.nn.Linear(2 * HIDDEN, HIDDEN, bias=False)
        self.block = Glm4MoeDecoderLayer(settings, LAYERS - 1)
        self.shared_head = torch.nn.ModuleDict(
            {"norm": Glm4MoeRMSNorm(HIDDEN), "head": torch.nn.Linear(HIDDEN, VOCABULARY, bias=False)}
        )
        self.rotary = Glm4MoeRotaryEmbedding(settings)

    def forward(self, states: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Return logits `[1, L, V]` for states `[1, L, H]` and the tokens `[1, L]` that follow them."""
        x = self.eh_proj(torch.cat([self.enorm(self.embed_tokens(ids)), self.hnorm(states)], dim=-1))
        positions = torch.arange(ids.shape[1])[None]
        mask = create_causal_mask(
            config=self.settings, inputs_embeds=x, attention_mask=None, past_key_values=None, position_ids=positions
        )
        x = self.block(x, attention_mask=mask, position_ids=positions, position_embeddings=self.rotary(x, positions))
        return self.shared_head["head"](self.shared_head["norm"](x))


def write_model(directory: Path) -> Path:
    """Write target and draft as one dense checkpoint, as the released models are laid out."""
    torch.manual_seed(5)
    settings = config()
    target, draft = Glm4MoeForCausalLM(settings), NextN(settings)
    tokens = torch.linalg.qr(torch.randn(HIDDEN, HIDDEN)).Q
    following = torch.randperm(VOCABULARY)
    with torch.no_grad():
        # Small weights everywhere: what layers add must not change the next token, only its margin.
        for module in (target, draft.block):
            for parameter in module.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(0, 0.02)
        for embedding, head in (
            (target.model.embed_tokens, target.lm_head),
            (draft.embed_tokens, draft.shared_head["head"]),
        ):
            embedding.weight.copy_(8 * tokens)
            head.weight[following] = tokens
        draft.eh_proj.weight.copy_(torch.cat([torch.eye(HIDDEN), 0.02 * torch.randn(HIDDEN, HIDDEN)], dim=1))
    target.save_pretrained(directory)
    tensors = load_file(directory / "model.safetensors")
    block = Glm4MoeForCausalLM(config())
    block.model.layers[LAYERS - 1].load_state_dict(draft.block.state_dict())
    block.save_pretrained(directory / "block")
    for name, tensor in load_file(directory / "block" / "model.safetensors").items():
        if name.startswith(f"model.layers.{LAYERS - 1}."):
            tensors[name.replace(f"layers.{LAYERS - 1}", f"layers.{LAYERS}")] = tensor.clone()
    for name, tensor in draft.state_dict().items():
        if not name.startswith(("block.", "rotary.")):
            tensors[f"{PREFIX}.{name}"] = tensor.clone()
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    assert json.loads((directory / "config.json").read_text())["num_nextn_predict_layers"] == 1
    return directory


@torch.no_grad()
def accept_length(target: torch.nn.Module, draft: NextN, first: int, tokens: int = 24) -> float:
    """Return how many tokens a step of greedy decoding yields on average, with one drafted token a step."""
    ids, steps = [first], 0
    while len(ids) < tokens:
        run = target.model(torch.tensor([ids])).last_hidden_state
        following = int(target.lm_head(run[:, -1]).argmax())
        drafted = int(draft(run, torch.tensor([[*ids[1:], following]]))[0, -1].argmax())
        ids.append(following)
        confirmed = int(target(torch.tensor([ids])).logits[0, -1].argmax())
        ids += [drafted] if drafted == confirmed else []
        steps += 1
    return (len(ids) - 1) / steps


def fill(draft: NextN, dense: Mapping[str, torch.Tensor], quantized: Mapping[str, torch.nn.Module]) -> NextN:
    """Put tensors and quantized layers, both by the names of the module, into their places."""
    for path, layer in quantized.items():
        if path != "block.mlp.experts":
            draft.set_submodule(path, layer)
    draft.block.mlp = RoutedAndShared(draft.block.mlp.gate, quantized["block.mlp.experts"])
    state = dict(draft.named_parameters()) | dict(draft.named_buffers())
    with torch.no_grad():
        for name, tensor in dense.items():
            state[name].copy_(tensor)
    return draft.eval()
