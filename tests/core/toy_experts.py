"""
Small mixtures of experts in the toy format.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file

from quantplug_testkit import toys

if TYPE_CHECKING:
    from pathlib import Path

HIDDEN, INNER, VOCAB = 32, 16, 24
PROJECTIONS = {"gate_proj": (INNER, HIDDEN), "up_proj": (INNER, HIDDEN), "down_proj": (HIDDEN, INNER)}


def container(layer: int) -> str:
    """Return the path of a layer's experts."""
    return f"model.layers.{layer}.mlp.experts"


def dense_moe(layers: int = 2, experts: int = 4, *, bias: bool = False) -> dict[str, torch.Tensor]:
    """Return the tensors of a tiny dense mixture of experts, reproducible."""
    generator = torch.Generator().manual_seed(11)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(torch.bfloat16)

    tensors = {"model.embed_tokens.weight": normal(VOCAB, HIDDEN)}
    for layer in range(layers):
        tensors[f"model.layers.{layer}.mlp.gate.weight"] = normal(experts, HIDDEN)
        for expert in range(experts):
            for name, shape in PROJECTIONS.items():
                tensors[f"{container(layer)}.{expert}.{name}.weight"] = normal(*shape)
                if bias:
                    tensors[f"{container(layer)}.{expert}.{name}.bias"] = normal(shape[0])
    tensors["model.norm.weight"] = normal(HIDDEN)
    return tensors


def toy_moe(layers: int = 2, experts: int = 4, *, bias: bool = False) -> dict[str, torch.Tensor]:
    """Return the same model with its experts in the toy format and its routers whole."""
    scheme = toys.ToyScheme.build({}, "test")
    result: dict[str, torch.Tensor] = {}
    for name, tensor in dense_moe(layers, experts, bias=bias).items():
        path, _, suffix = name.rpartition(".")
        if suffix == "weight" and path.endswith("_proj"):
            stored = scheme.encode(scheme.quantize(tensor))
            result |= {f"{path}.{part}": value for part, value in stored.items()}
        else:
            result[name] = tensor
    return result


def write_moe(
    directory: Path,
    tensors: dict[str, torch.Tensor],
    *,
    experts: int | None = 4,
    quantized: bool = True,
    **more: object,
) -> Path:
    """Write a mixture of experts with the configuration that belongs to it."""
    directory.mkdir(parents=True, exist_ok=True)
    config: dict[str, object] = {
        "model_type": "toy_moe", "dtype": "float32", "tie_word_embeddings": True, "num_experts_per_tok": 2,
        "hidden_act": "silu", **more,
    }  # fmt: skip
    if experts is not None:
        config["num_experts"] = experts
    if quantized:
        config.setdefault("quantization_config", {"quant_method": "toy", "keep": ["re:.*mlp\\.gate$"]})
    (directory / "config.json").write_text(json.dumps(config))
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    return directory


def expected(
    tensors: dict[str, torch.Tensor], layer: int, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor
) -> torch.Tensor:
    """Return what the experts of a layer make of x `[M, H]`, row by row in float64, from the stored tensors."""

    def values(expert: int, name: str) -> torch.Tensor:
        path = f"{container(layer)}.{expert}.{name}"
        return tensors[f"{path}.codes"].double() * tensors[f"{path}.scale"].double()

    def bias(expert: int, name: str) -> torch.Tensor | float:
        return tensors.get(f"{container(layer)}.{expert}.{name}.bias", torch.zeros(())).double()

    y = torch.zeros(len(x), HIDDEN, dtype=torch.float64)
    for row, (chosen, factors) in enumerate(zip(ids.tolist(), weights.tolist(), strict=True)):
        for expert, factor in zip(chosen, factors, strict=True):
            if f"{container(layer)}.{expert}.gate_proj.codes" not in tensors:
                continue
            gate, up = (
                values(expert, name) @ x[row].double() + bias(expert, name) for name in ("gate_proj", "up_proj")
            )
            inner = gate * torch.sigmoid(gate) * up
            y[row] += factor * (values(expert, "down_proj") @ inner + bias(expert, "down_proj"))
    return y
