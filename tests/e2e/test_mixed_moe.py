"""
A mixture of experts in MXFP8 with one layer left in bfloat16, by a list that many readers get wrong.

The list says `model.layers.4.`: layer 4 stays whole, and layer 40, whose name begins alike, does not. The model learns
to copy in the test; its layers of use are 4, 40 and 41, all others hand on what they get.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import quantplug
from quantplug.entries import path_entries
from quantplug_transformers import from_pretrained

if TYPE_CHECKING:
    from pathlib import Path

LEARNT = (4, 40, 41)
LAYERS = 42
LENGTH, SYMBOLS = 4, 12
SEPARATOR = SYMBOLS
ENTRY = "model.layers.4."


def config(layers: int) -> Qwen3MoeConfig:
    return Qwen3MoeConfig(
        vocab_size=SYMBOLS + 8, hidden_size=64, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, moe_intermediate_size=32, num_experts=2, num_experts_per_tok=1,
        max_position_embeddings=64, tie_word_embeddings=False, decoder_sparse_step=1, norm_topk_prob=True,
    )  # fmt: skip


def examples(count: int, seed: int) -> torch.Tensor:
    """Return `[count, 2 LENGTH + 1]`: symbols, a separator, and the same symbols."""
    symbols = torch.randint(0, SYMBOLS, (count, LENGTH), generator=torch.Generator().manual_seed(seed))
    return torch.cat([symbols, torch.full((count, 1), SEPARATOR), symbols], dim=1)


@torch.no_grad()
def score(model: torch.nn.Module) -> float:
    """Return the share of symbols copied right of those nobody has seen in training."""
    ids = examples(100, seed=1_000_000)
    guessed = model(ids[:, :-1]).logits[:, LENGTH:].argmax(-1)
    return float((guessed == ids[:, LENGTH + 1 :]).float().mean())


def taught() -> Qwen3MoeForCausalLM:
    """Return a model of as many layers as are of use, that has learnt to copy."""
    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(config(len(LEARNT)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    for step in range(400):
        ids = examples(48, seed=step)
        logits = model(ids[:, :-1]).logits[:, LENGTH:]
        loss = torch.nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), ids[:, LENGTH + 1 :].reshape(-1))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if loss.item() < 0.02:
            break
    return model.eval().to(torch.bfloat16)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the model with its layers in places 4, 40 and 41, and layers before and between that change nothing."""
    small, directory = tmp_path_factory.mktemp("small"), tmp_path_factory.mktemp("dense")
    taught().save_pretrained(small)
    stored = load_file(small / "model.safetensors")
    tensors = {name: tensor for name, tensor in stored.items() if not name.startswith("model.layers.")}
    for place in range(LAYERS):
        source = LEARNT.index(place) if place in LEARNT else 0
        for name, tensor in stored.items():
            if name.startswith(f"model.layers.{source}."):
                idle = place not in LEARNT and name.endswith(("o_proj.weight", "down_proj.weight"))
                copied = torch.zeros_like(tensor) if idle else tensor.clone()
                tensors[name.replace(f"layers.{source}.", f"layers.{place}.", 1)] = copied
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    written = json.loads((small / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(written | {"num_hidden_layers": LAYERS}))
    return directory


@pytest.fixture(scope="module")
def mixed(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the model in MXFP8, with the list that leaves layer 4 whole spelled as its maker spelled it."""
    directory = tmp_path_factory.mktemp("mixed") / "mxfp8"
    quantplug.convert(dense, directory, scheme="mxfp8", params={}, skip=path_entries([ENTRY], "test"))
    path = directory / "config.json"
    written = json.loads(path.read_text())
    scale = next(name for name in load_file(directory / "model.safetensors") if name.endswith("scale"))
    written["quantization_config"] = {
        "quant_method": "mxfp8", "modules_to_not_convert": [ENTRY, "lm_head", "re:.*mlp\\.gate$"],
    }  # fmt: skip
    assert scale.endswith("weight_scale")
    path.write_text(json.dumps(written))
    return directory


def test_the_layers_of_the_list_are_whole_and_those_whose_names_begin_alike_are_not(mixed: Path) -> None:
    planned = quantplug.plan(mixed, platform="cpu")
    for place in range(LAYERS):
        for name in ("mlp.experts", "self_attn.q_proj"):
            layer = planned.layer(f"model.layers.{place}.{name}")
            assert layer.quantized == (place != 4), layer.rule
    assert planned.layer("model.layers.4.mlp.experts").rule.startswith(ENTRY)
    assert any("read as" in text and ENTRY in text for text in planned.warnings)


def test_it_scores_as_in_bfloat16_and_with_the_rule_broken_it_does_not(dense: Path, mixed: Path) -> None:
    whole = score(from_pretrained(dense))
    assert whole > 0.95
    model = from_pretrained(mixed)
    assert score(model) == pytest.approx(whole, abs=0.01)
    assert score(from_pretrained(dense, quantize="mxfp8", skip=[ENTRY])) == pytest.approx(whole, abs=0.01)
    broken = from_pretrained(dense)
    for place in (40, 41):
        read_as_whole(broken, mixed, f"model.layers.{place}.")
    assert score(broken) < whole - 0.2


def read_as_whole(model: torch.nn.Module, directory: Path, prefix: str) -> None:
    """Do what a reader does for whom `model.layers.4.` covers layers 40 and 41: take codes for weights."""
    stored = load_file(directory / "model.safetensors")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in stored and name.startswith(prefix):
                parameter.copy_(stored[name])
        experts = model.get_submodule(f"{prefix}mlp.experts")
        for expert in range(2):
            gate, up, down = (
                stored[f"{prefix}mlp.experts.{expert}.{name}.weight"].to(torch.bfloat16)
                for name in ("gate_proj", "up_proj", "down_proj")
            )
            experts.gate_up_proj[expert].copy_(torch.cat([gate, up]))
            experts.down_proj[expert].copy_(down)
