"""
Stored tensors for the tests, made without the code under test, and the golden files.
"""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from quantplug.spec import LinearShape, PerBlock, PerChannel, PerGroup, PerTensor
from quantplug_int8.scheme import Int8Scheme
from quantplug_testkit.oracles import int8 as oracle

GOLDEN = Path(__file__).parent / "golden"
DTYPES = {
    "I8": torch.int8, "U8": torch.uint8, "BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32,
}  # fmt: skip


@dataclass
class Layer:
    """One stored layer."""

    scheme: Int8Scheme
    shape: LinearShape
    tensors: dict[str, torch.Tensor]

    def values(self) -> np.ndarray:
        """Return what the oracle reads from the tensors, float64 `[N, K]`."""
        rows, inputs = tile(self.scheme, self.shape)
        size = -(-self.shape.out_features // rows), -(-self.shape.in_features // inputs)
        zeros = self.tensors.get("weight_zero_point")
        scales = self.tensors[self.scheme.scale_name].double().numpy().reshape(size)
        return oracle.dequantize(
            self.tensors["weight"].numpy(), scales, None if zeros is None else zeros.numpy().reshape(size), rows, inputs
        )


def build(**params: object) -> Int8Scheme:
    return Int8Scheme.build(params, "test")


def tile(scheme: Int8Scheme, shape: LinearShape) -> tuple[int, int]:
    """Return rows and inputs that share a scale."""
    match scheme.granularity:
        case PerTensor():
            return shape.out_features, shape.in_features
        case PerChannel():
            return 1, shape.in_features
        case PerGroup(size=size):
            return 1, size
        case PerBlock(n=n, k=k):
            return n, k


def stored_layer(scheme: Int8Scheme, n: int, k: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Layer:
    """Return a random layer as a file of that scheme stores it."""
    random = np.random.default_rng(seed)
    shape = LinearShape(n, k)
    rows, inputs = tile(scheme, shape)
    size = -(-n // rows), -(-k // inputs)
    half = 1 << (scheme.bits - 1)
    stored_size = (1,) if isinstance(scheme.granularity, PerTensor) else size
    tensors = {
        "weight": random.integers(-half, half, (n, k), dtype=np.int8),
        scheme.scale_name: random.standard_normal(stored_size) * 0.1,
    }
    if not scheme.symmetric:
        tensors["weight_zero_point"] = random.integers(-half, half, stored_size, dtype=np.int8)
    result = {name: torch.from_numpy(array) for name, array in tensors.items()}
    result[scheme.scale_name] = result[scheme.scale_name].to(dtype)
    if scheme.activation is not None and not scheme.activation.dynamic:
        result["input_scale"] = torch.tensor([0.0625], dtype=dtype)
        if not scheme.activation.element.signed:
            result["input_zero_point"] = torch.tensor([-3], dtype=torch.int8)
    return Layer(scheme, shape, result)


def read(case: str) -> dict:
    return json.loads((GOLDEN / f"{case}.json").read_text())


def tensor(spelled: dict) -> torch.Tensor:
    data = bytearray(base64.b64decode(spelled["data"]))
    return torch.frombuffer(data, dtype=DTYPES[spelled["dtype"]]).view(spelled["shape"])
