"""
Small checkpoints in the toy format, and a registry that reads them.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file

from quantplug.plugins import build_registry
from quantplug_testkit import toys

if TYPE_CHECKING:
    from pathlib import Path

    from quantplug.registry import Registry

HIDDEN, INNER, VOCAB = 32, 48, 40
LINEAR = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (HIDDEN // 2, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}


def toy_registry(**more: object) -> Registry:
    """Return a registry with the toy plugin (as distribution "toys") and any others given."""
    return build_registry({"toys": toys, **more})


def dense_tensors(layers: int = 2) -> dict[str, torch.Tensor]:
    """Return the tensors of a tiny tied Llama-like model, reproducible."""
    generator = torch.Generator().manual_seed(7)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(torch.bfloat16)

    tensors = {"model.embed_tokens.weight": normal(VOCAB, HIDDEN)}
    for number in range(layers):
        for name, shape in LINEAR.items():
            tensors[f"model.layers.{number}.{name}.weight"] = normal(*shape)
        tensors[f"model.layers.{number}.self_attn.q_proj.bias"] = normal(HIDDEN)
        tensors[f"model.layers.{number}.input_layernorm.weight"] = normal(HIDDEN)
    tensors["model.norm.weight"] = normal(HIDDEN)
    return tensors


def toy_tensors(keep: tuple[str, ...] = (), layers: int = 2) -> dict[str, torch.Tensor]:
    """Return the same model with its linear layers in the toy format, but those whose path contains one of `keep`."""
    scheme = toys.ToyScheme.build({}, "test")
    result: dict[str, torch.Tensor] = {}
    for name, tensor in dense_tensors(layers).items():
        path, _, suffix = name.rpartition(".")
        if suffix == "weight" and path.endswith("_proj") and not any(part in path for part in keep):
            stored = scheme.encode(scheme.quantize(tensor))
            result |= {f"{path}.{part}": value for part, value in stored.items()}
        else:
            result[name] = tensor
    return result


def write_checkpoint(
    directory: Path, tensors: dict[str, torch.Tensor], quantization: dict[str, object] | None = None
) -> Path:
    """Write config.json and model.safetensors."""
    directory.mkdir(parents=True, exist_ok=True)
    config: dict[str, object] = {"model_type": "llama", "dtype": "bfloat16", "tie_word_embeddings": True}
    if quantization is not None:
        config["quantization_config"] = quantization
    (directory / "config.json").write_text(json.dumps(config))
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    return directory


def toy_checkpoint(directory: Path, keep: tuple[str, ...] = (), **fields: object) -> Path:
    """Write a whole toy checkpoint whose configuration says what it keeps dense."""
    return write_checkpoint(directory, toy_tensors(keep), {"quant_method": "toy", "keep": list(keep), **fields})
