"""
Stored layers for the tests, packed by the oracle and not by the code under test, and what the oracle reads from them.
"""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from quantplug.spec import LinearShape
from quantplug_mx.mxfp4 import MXFP4Scheme
from quantplug_mx.mxfp8 import MXFP8Scheme
from quantplug_mx.nvfp4 import NVFP4Scheme
from quantplug_testkit.oracles import mx as oracle

if TYPE_CHECKING:
    from quantplug_mx.scheme import GroupedScheme

GOLDEN = Path(__file__).parent / "golden"
SCHEMES = {scheme.name: scheme for scheme in (MXFP8Scheme, MXFP4Scheme, NVFP4Scheme)}
MX_ACTIVATION = "float8_e4m3fn/group32/dynamic/float8_e8m0fnu"
NV_ACTIVATION = "float4_e2m1fn/group16/dynamic/float8_e4m3fn+global"


def build(name: str, **params: str) -> GroupedScheme:
    """Return a scheme by its name."""
    return SCHEMES[name].build(params, "test")


@dataclass
class Layer:
    """One stored layer, and its values float64 `[N, K]` as the oracle reads them."""

    scheme: GroupedScheme
    shape: LinearShape
    tensors: dict[str, torch.Tensor]
    values: np.ndarray

    def decode(self):
        """Decode the layer as it is now."""
        return self.scheme.decode(self.tensors, self.shape, "layer")


def numbers(name: str, number: float) -> torch.Tensor:
    """Return a number of a layer in the shape that its writer gives it."""
    value = torch.tensor(number, dtype=torch.float32)
    return value.reshape(1) if name.endswith("global_scale") else value


def stored_layer(scheme: GroupedScheme, n: int, k: int, seed: int = 0, *, stored_global: float = 3072.75) -> Layer:
    """Return a random layer as a file of that scheme stores it; every finite code and scale may occur."""
    random = np.random.default_rng(seed)
    groups = -(-k // scheme.group)
    tensors: dict[str, torch.Tensor] = {}
    scale_name = "weight_scale_inv" if scheme.scale_name == "either" else scheme.scale_name
    if scheme.name == "nvfp4":
        scales = random.integers(1, 127, (n, groups)).astype(np.uint8)
        tensors[scale_name] = torch.from_numpy(scales.copy()).view(torch.float8_e4m3fn)
        tensors[scheme.global_name] = numbers(scheme.global_name, stored_global)
    else:
        scales = random.integers(0, 255, (n, groups)).astype(np.uint8)
        tensors[scale_name] = torch.from_numpy(scales.copy())
    if scheme.name == "mxfp8":
        codes = random.integers(0, 255, (n, k)).astype(np.uint8)
        codes[codes & 0x7F == 0x7F] = 0
        tensors["weight"] = torch.from_numpy(codes.copy()).view(torch.float8_e4m3fn)
        values = oracle.mxfp8(codes, scales)
    else:
        packed = oracle.pack(random.integers(0, 16, (n, k)).astype(np.uint8))
        tensors[scheme.weight_name] = torch.from_numpy(packed.copy())
        if scheme.name == "mxfp4":
            values = oracle.mxfp4(packed, scales)
        elif scheme.global_name == "weight_global_scale":
            values = oracle.nvfp4(packed, scales, divide_by=stored_global)
        else:
            values = oracle.nvfp4(packed, scales, multiply_by=stored_global)
    return Layer(scheme, LinearShape(n, k), tensors, values)


def same_bits(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Whether two tensors agree in dtype, shape and every bit, the signs of zeros included."""
    return (
        found.dtype == wanted.dtype
        and found.shape == wanted.shape
        and torch.equal(found.contiguous().reshape(-1).view(torch.uint8), wanted.reshape(-1).view(torch.uint8))
    )


def as_float32(values: np.ndarray) -> np.ndarray:
    """Round exact values once, as a reader in float32 does; the largest become infinite."""
    with np.errstate(over="ignore"):
        return values.astype(np.float32)


def golden(case: str) -> dict[str, Any]:
    """Return a golden file with its tensors as torch has them."""
    document = json.loads((GOLDEN / f"{case}.json").read_text())
    document["tensors"] = {suffix: _tensor(spelled) for suffix, spelled in document["tensors"].items()}
    return document | {key: _tensor(document[key]) for key in ("dequantized", "dense")}


def _tensor(spelled: dict[str, Any]) -> torch.Tensor:
    octets = torch.frombuffer(bytearray(base64.b64decode(spelled["data"])), dtype=torch.uint8)
    return octets.view(getattr(torch, spelled["dtype"])).view(spelled["shape"])
