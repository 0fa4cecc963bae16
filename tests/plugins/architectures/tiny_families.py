"""
Tiny random models of the real Transformers classes: as they are saved, and with quantized experts in any spelling.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file

from quantplug.config import resolve_config
from quantplug.plugins import registry as installed
from quantplug.policy import Policy
from quantplug.schemes import SchemeCache
from quantplug.spec import LinearShape
from quantplug.weight import ActivationParams
from quantplug_testkit.canonical import make_weight

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from quantplug.scheme import LinearScheme
    from quantplug.weight import Weight

HIDDEN, INNER, EXPERTS, TOP_K, WORDS, LAYERS = 64, 32, 4, 2, 96, 2
REFERENCE = Policy.parse({"rule": [{"pin": "reference"}]}, "test")

SHARED: dict[str, Any] = {
    "hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": 2, "num_key_value_heads": 1,
    "head_dim": 32, "vocab_size": WORDS, "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 0, "intermediate_size": INNER, "tie_word_embeddings": False,
}  # fmt: skip
_ROUTED = {"n_routed_experts": EXPERTS, "num_experts_per_tok": TOP_K, "moe_intermediate_size": INNER,
           "n_shared_experts": 1, "first_k_dense_replace": 0, "num_mtp_layers": 0}  # fmt: skip
_LATENT = {"num_key_value_heads": 2, "q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 16,
           "qk_rope_head_dim": 16, "v_head_dim": 32, "head_dim": 16, "n_group": 2, "topk_group": 1}  # fmt: skip

# family: (model class, configuration class, what its configuration says beside SHARED, container of layer N)
FAMILIES: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "qwen3_moe": (
        "Qwen3MoeForCausalLM", "Qwen3MoeConfig",
        {"num_experts": EXPERTS, "num_experts_per_tok": TOP_K, "moe_intermediate_size": INNER}, "mlp.experts",
    ),
    "mixtral": (
        "MixtralForCausalLM", "MixtralConfig", {"num_local_experts": EXPERTS, "num_experts_per_tok": TOP_K},
        "block_sparse_moe.experts",
    ),
    "deepseek_v2": ("DeepseekV2ForCausalLM", "DeepseekV2Config", _ROUTED | _LATENT, "mlp.experts"),
    "deepseek_v3": ("DeepseekV3ForCausalLM", "DeepseekV3Config", _ROUTED | _LATENT, "mlp.experts"),
    "glm4_moe": ("Glm4MoeForCausalLM", "Glm4MoeConfig", _ROUTED | {"use_qk_norm": True}, "mlp.experts"),
    "gpt_oss": (
        "GptOssForCausalLM", "GptOssConfig",
        {"num_local_experts": EXPERTS, "num_experts_per_tok": TOP_K, "max_position_embeddings": 131072,
         "swiglu_limit": 5.0}, "mlp.experts",
    ),
    "gemma4": (
        "Gemma4ForCausalLM", "Gemma4TextConfig",
        {"global_head_dim": 32, "num_global_key_value_heads": 1, "attention_k_eq_v": True, "enable_moe_block": True,
         "moe_intermediate_size": INNER, "num_experts": EXPERTS, "top_k_experts": TOP_K, "sliding_window": 16,
         "hidden_size_per_layer_input": 0, "layer_types": ["sliding_attention", "full_attention"]}, "experts",
    ),
    "llama4": (
        "Llama4ForCausalLM", "Llama4TextConfig",
        {"num_local_experts": EXPERTS, "num_experts_per_tok": 1, "interleave_moe_layer_step": 1,
         "intermediate_size_mlp": INNER, "attention_chunk_size": 16}, "feed_forward.experts",
    ),
}  # fmt: skip
DENSE_FAMILIES: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", {}, ""),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {}, ""),
}


@dataclass(frozen=True)
class Expert:
    """What one expert multiplies with, in float32: `[I, H]`, `[I, H]`, `[H, I]`, and biases of the same order."""

    gate: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor
    biases: tuple[torch.Tensor, ...] = ()


@dataclass(frozen=True)
class Tiny:
    """A model, what it stores, and its experts by container path in files."""

    family: str
    model: Any
    config: dict[str, Any]
    state: dict[str, torch.Tensor]
    experts: Mapping[str, list[Expert]]

    @property
    def others(self) -> dict[str, torch.Tensor]:
        """The stored tensors that belong to no expert."""
        return {name: t for name, t in self.state.items() if not name.startswith(tuple(f"{p}." for p in self.experts))}


def build(family: str, directory: Path) -> Tiny:
    """Build a model, fill it from a seed, save it as Transformers does, and read off its experts."""
    model_class, config_class, own, container = {**FAMILIES, **DENSE_FAMILIES}[family]
    config = getattr(transformers, config_class)(**{**SHARED, **own})
    config.architectures = [model_class]
    torch.manual_seed(len(family))
    model = getattr(transformers, model_class)(config).to(torch.bfloat16).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            norm = parameter.dim() < 2 and "bias" not in name
            parameter.normal_(float(norm), 0.1 if parameter.dim() < 2 else 0.15)
    model.save_pretrained(directory)
    experts = {f"model.layers.{n}.{container}": _experts(family, layer) for n, layer in enumerate(model.model.layers)}
    return Tiny(
        family, model, json.loads((directory / "config.json").read_text()),
        load_file(directory / "model.safetensors"), experts if container else {},
    )  # fmt: skip


def _experts(family: str, layer: torch.nn.Module) -> list[Expert]:
    """Read the experts of a layer as the model's own forward pass understands its parameters."""
    module = next((m for name, m in layer.named_modules() if name.rpartition(".")[2] == "experts"), None)
    if module is None:
        return []
    joined, down = module.gate_up_proj.detach().float(), module.down_proj.detach().float()
    if family in ("gpt_oss", "llama4"):
        joined, down = joined.transpose(1, 2), down.transpose(1, 2)
    found = []
    for number, (both, second) in enumerate(zip(joined, down, strict=True)):
        apart = (both[0::2], both[1::2]) if family == "gpt_oss" else both.chunk(2)
        biases: tuple[torch.Tensor, ...] = ()
        if family == "gpt_oss":
            bias = module.gate_up_proj_bias.detach()[number]
            biases = (bias[0::2], bias[1::2], module.down_proj_bias.detach()[number])
        found.append(Expert(*(part.contiguous() for part in apart), second.contiguous(), biases))
    return found


def scheme_of(tiny: Tiny, directory: Path, quantization: Mapping[str, Any], **fields: Any) -> LinearScheme:
    """Write a configuration and return the scheme that it means for experts."""
    directory.mkdir(exist_ok=True)
    config = {**tiny.config, **fields, "quantization_config": quantization}
    (directory / "config.json").write_text(json.dumps(config))
    found = resolve_config(directory, installed())
    ref = found.default or next(rule.use for rule in found.rules if rule.use is not None)
    return SchemeCache(installed()).get(ref, "test")


def rounded(scheme: LinearScheme, dense: torch.Tensor) -> Weight:
    """Quantize a weight as the scheme does."""
    return scheme.quantize(dense)


def anything(scheme: LinearScheme, dense: torch.Tensor) -> Weight:
    """Return any weight of that size that obeys the scheme's contract: all codes, zero points and orders of inputs."""
    generator = np.random.default_rng(dense.to(torch.bfloat16).view(torch.uint8).flatten()[:64].tolist())
    return make_weight(scheme.weight_spec(), *dense.shape, generator, scales="spread")


def write_apart(
    tiny: Tiny,
    directory: Path,
    scheme: LinearScheme,
    names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
    make: Callable[[LinearScheme, torch.Tensor], Weight] = rounded,
    place: Callable[[str], str] = lambda path: path,
) -> dict[str, list[tuple[Weight, Weight, Weight]]]:
    """
    Write every projection of every expert by itself.

    Args:
        tiny: the model.
        directory: where its config.json is.
        scheme: what it is stored in.
        names: of gate, up and down.
        make: what is written for a dense weight.
        place: what the container of an expert and its siblings are called.

    Returns:
        What was written, by container and expert.
    """
    state = {place(name): tensor for name, tensor in tiny.others.items()}
    written: dict[str, list[tuple[Weight, Weight, Weight]]] = {}
    for container, experts in tiny.experts.items():
        for number, expert in enumerate(experts):
            weights = []
            for part, (name, dense) in enumerate(zip(names, (expert.gate, expert.up, expert.down), strict=True)):
                path = f"{place(container)}.{number}.{name}"
                stored = encoded(scheme, make(scheme, dense))
                state |= {f"{path}.{suffix}": tensor for suffix, tensor in stored.items()}
                if expert.biases:
                    state[f"{path}.bias"] = expert.biases[part].contiguous()
                weights.append(scheme.decode(stored, LinearShape(*dense.shape), path))
            written.setdefault(place(container), []).append(tuple(weights))
    save_file(state, directory / "model.safetensors", {"format": "pt"})
    return written


def encoded(scheme: LinearScheme, weight: Weight) -> dict[str, torch.Tensor]:
    """Return the tensors that a file stores for a weight; of two names that a scale may have, one."""
    tensors = {suffix: t.clone().contiguous() for suffix, t in scheme.encode(weight, _activation(scheme)).items()}
    if "weight_scale_inv" in tensors:
        tensors.pop("weight_scale", None)
    return tensors


def _activation(scheme: LinearScheme) -> ActivationParams | None:
    """Return what a file stores about x, where the scheme wants it."""
    spec = scheme.activation_spec()
    if spec is None or (spec.dynamic and not spec.global_scale):
        return None
    factor = torch.tensor(1 / 64.0)
    return ActivationParams(global_scale=factor.double()) if spec.global_scale else ActivationParams(scale=factor)
