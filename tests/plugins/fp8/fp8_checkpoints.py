"""
Small whole checkpoints in FP8, and a registry with the plugin alone.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from fp8_files import Layer, stored_layer
from safetensors.torch import save_file

from quantplug.plugins import build_registry
from quantplug_fp8 import plugin

REGISTRY = build_registry({"quantplug-fp8": plugin})
HIDDEN, INNER, HEADS = 40, 72, 24
LINEAR = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (HEADS, HIDDEN),
    "self_attn.v_proj": (HEADS, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}


def layers(count: int = 2, **params: object) -> dict[str, Layer]:
    """Return the quantized layers of a tiny model by path, each of its own numbers."""
    return {
        f"model.layers.{number}.{name}": stored_layer(*shape, seed=100 * number + place, **params)
        for number in range(count)
        for place, (name, shape) in enumerate(LINEAR.items())
    }


def tensors_of(quantized: dict[str, Layer]) -> dict[str, torch.Tensor]:
    """Return every tensor of the model: the quantized layers, an embedding, a head, norms."""
    normal = torch.Generator().manual_seed(5)
    tensors = {
        "model.embed_tokens.weight": torch.randn(16, HIDDEN, generator=normal).bfloat16(),
        "model.norm.weight": torch.ones(HIDDEN).bfloat16(),
        "lm_head.weight": torch.randn(16, HIDDEN, generator=normal).bfloat16(),
    }
    for path, layer in quantized.items():
        tensors |= {f"{path}.{suffix}": tensor for suffix, tensor in layer.tensors.items()}
    return tensors


def write(directory: Path, tensors: dict[str, torch.Tensor], **section: object) -> Path:
    """Write a checkpoint whose configuration is that of method fp8, unless the section says another."""
    directory.mkdir(parents=True, exist_ok=True)
    config = {
        "model_type": "llama",
        "dtype": "float32",
        "tie_word_embeddings": False,
        "quantization_config": {"quant_method": "fp8", **section},
    }
    (directory / "config.json").write_text(json.dumps(config))
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    return directory
