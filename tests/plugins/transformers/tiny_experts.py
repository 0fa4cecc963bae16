"""
Tiny mixtures of experts of the real classes, with their experts in GPTQ form and dense with the same values.
"""

from __future__ import annotations

import json
import re
import shutil
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from tiny_models import PARAMS, config_of, rounded, write_dense

from quantplug.plugins import build_registry
from quantplug_architectures import plugin as architectures
from quantplug_gptq import plugin as gptq
from quantplug_gptq.scheme import GPTQScheme

if TYPE_CHECKING:
    from pathlib import Path

    from quantplug.registry import Registry

ROUTED = {
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_shared_experts": 1,
    "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v3": {
        **ROUTED, "num_key_value_heads": 4, "q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 16, "v_head_dim": 16,
    },
    "glm4_moe": {**ROUTED, "head_dim": 16},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16},
    "gemma4_text": {
        "head_dim": 16, "global_head_dim": 16, "num_global_key_value_heads": 1, "attention_k_eq_v": True,
        "enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32,
        "hidden_size_per_layer_input": 0, "sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"],
    },
}  # fmt: skip
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
_STORED = re.compile(r"(?P<container>.*\.experts)\.(?:(?P<number>\d+)\.)?(?P<last>\w+?(?:_bias)?)(?:\.weight)?")


def experts_registry() -> Registry:
    """Return a registry with the GPTQ format, the families, and no kernel but the reference."""
    return build_registry({"quantplug-gptq": gptq, "quantplug-architectures": architectures})


def write_family(family: str, directory: Path) -> Path:
    """Write a dense model of a family."""
    return write_dense(directory, config_of(family, **FAMILIES[family]))


def quantize_experts(dense: Path, directory: Path, scratch: Path) -> Path:
    """
    Write a dense checkpoint with each projection of each expert in GPTQ form, and to `scratch` one with their values.

    Experts that lie in one tensor are taken apart, with the names that llm-compressor and GPTQModel give them.
    """
    scheme = GPTQScheme.build(PARAMS, "test")
    tensors = load_file(dense / "model.safetensors")
    quantized, values = {}, {}
    for name, tensor in tensors.items():
        match = _STORED.fullmatch(name)
        if match is None or name.endswith("correction_bias"):
            quantized[name] = values[name] = tensor
        elif match["number"] is not None:
            weight = rounded(tensor, scheme)
            values[name] = weight.dequantize(torch.float32)
            path = name.removesuffix(".weight")
            quantized |= {f"{path}.{suffix}": stored for suffix, stored in scheme.encode(weight).items()}
        elif match["last"].endswith("_bias"):
            values[name] = tensor
            for number, bias in enumerate(tensor):
                for projection, part in _apart(match["last"].removesuffix("_bias"), bias, in_turns=True):
                    quantized[f"{match['container']}.{number}.{projection}.bias"] = part
        else:
            turned = name.replace(match["last"], "down_proj_bias") in tensors  # gpt-oss
            together = []
            for number, both in enumerate(tensor.transpose(1, 2) if turned else tensor):
                parts = []
                for projection, part in _apart(match["last"], both, in_turns=turned):
                    weight = rounded(part, scheme)
                    parts.append(weight.dequantize(torch.float32))
                    path = f"{match['container']}.{number}.{projection}"
                    quantized |= {f"{path}.{suffix}": stored for suffix, stored in scheme.encode(weight).items()}
                one = torch.stack(parts, 1).flatten(0, 1) if turned else torch.cat(parts)
                together.append(one.t() if turned else one)
            values[name] = torch.stack(together)
    section = {"quant_method": "gptq", **PARAMS, "dynamic": {r"-:^(?!.*\.experts\.\d)": {}}}
    _write(dense, directory, quantized, {"quantization_config": section})
    _write(dense, scratch, values, {})
    return directory


def _apart(name: str, both: torch.Tensor, *, in_turns: bool) -> list[tuple[str, torch.Tensor]]:
    if name == "down_proj":
        return [(name, both.contiguous())]
    halves = (both[0::2], both[1::2]) if in_turns else both.chunk(2)
    return [(half, part.contiguous()) for half, part in zip(PROJECTIONS[:2], halves, strict=True)]


def _write(dense: Path, directory: Path, tensors: dict[str, torch.Tensor], fields: dict[str, object]) -> None:
    directory.mkdir()
    for file in dense.iterdir():
        if file.name not in ("config.json", "model.safetensors"):
            shutil.copyfile(file, directory / file.name)
    save_file({name: t.contiguous() for name, t in tensors.items()}, directory / "model.safetensors", {"format": "pt"})
    config = json.loads((dense / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | fields))
