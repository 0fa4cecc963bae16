"""
Stored tensors for the tests, packed by the oracle and not by the code under test, and the golden files.
"""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from quantplug.spec import LinearShape
from quantplug_awq.scheme import AWQScheme
from quantplug_testkit.oracles import awq as oracle

GOLDEN = Path(__file__).parent / "golden"
DTYPES = {"I32": torch.int32, "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}


@dataclass
class Layer:
    """One stored layer."""

    scheme: AWQScheme
    shape: LinearShape
    tensors: dict[str, torch.Tensor]

    def values(self) -> np.ndarray:
        """Return what the oracle reads from the tensors, float64 `[N, K]`."""
        qweight, qzeros = (self.tensors[suffix].numpy() for suffix in ("qweight", "qzeros"))
        scales = self.tensors["scales"].double().numpy()
        return oracle.dequantize(qweight, qzeros, scales, self.scheme.group_size, self.scheme.version)


def build(**params: object) -> AWQScheme:
    return AWQScheme.build(params, "test")


def stored_layer(scheme: AWQScheme, n: int, k: int, seed: int = 0, dtype: torch.dtype = torch.float16) -> Layer:
    """Return a random layer as a file of that scheme stores it."""
    random = np.random.default_rng(seed)
    size = max(1, k) if scheme.group_size == -1 else scheme.group_size
    groups = 1 if scheme.group_size == -1 else k // size
    codes = random.integers(0, 16, (n, k))
    zeros = random.integers(0, 16, (n, groups))
    scales = random.standard_normal((n, groups)) * 0.1
    if not scheme.zero_point:
        zeros[:] = 8
    if scheme.version == "gemm":
        arrays = {
            "qweight": oracle.pack(codes.T, oracle.GEMM_FIELDS),
            "qzeros": oracle.pack(zeros.T, oracle.GEMM_FIELDS),
            "scales": scales.T,
        }
    else:
        beyond = ((0, 0), (0, 8 * oracle.zero_words(groups, size) - groups))
        arrays = {
            "qweight": oracle.pack(codes, oracle.GEMV_FIELDS),
            "qzeros": oracle.pack(np.pad(zeros, beyond), oracle.GEMV_FIELDS),
            "scales": np.pad(scales, beyond),
        }
    tensors = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}
    tensors["scales"] = tensors["scales"].to(dtype)
    return Layer(scheme, LinearShape(n, k), tensors)


def read(case: str) -> dict:
    return json.loads((GOLDEN / f"{case}.json").read_text())


def tensor(spelled: dict) -> torch.Tensor:
    data = bytearray(base64.b64decode(spelled["data"]))
    return torch.frombuffer(data, dtype=DTYPES[spelled["dtype"]]).view(spelled["shape"])
