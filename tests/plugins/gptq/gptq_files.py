"""
Stored tensors for the tests, packed by the oracle and not by the code under test.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from quantplug.spec import LinearShape
from quantplug_gptq.scheme import GPTQScheme
from quantplug_testkit.oracles import gptq as oracle


@dataclass
class Layer:
    """One stored layer and the numbers it was made from."""

    scheme: GPTQScheme
    shape: LinearShape
    tensors: dict[str, torch.Tensor]
    codes: np.ndarray
    zeros: np.ndarray
    g_idx: np.ndarray

    def values(self) -> np.ndarray:
        """Return what the oracle reads from the tensors, float64 `[N, K]`; v1 zero points by field."""
        scheme, arrays = self.scheme, {name: tensor.numpy() for name, tensor in self.tensors.items()}
        return oracle.dequantize(
            arrays["qweight"], arrays["qzeros"], arrays["scales"], arrays.get("g_idx"), scheme.bits, scheme.group_size,
            v2=scheme.checkpoint_format == "gptq_v2", sym=scheme.sym,
        )  # fmt: skip


def stored_layer(scheme: GPTQScheme, n: int, k: int, seed: int = 0, *, smallest_zero: int = 0) -> Layer:
    """Return a random layer as a file of that scheme stores it."""
    random = np.random.default_rng(seed)
    top = (1 << scheme.bits) - 1
    size = max(1, k) if scheme.group_size == -1 else scheme.group_size
    groups = 1 if scheme.group_size == -1 else -(-k // size)
    codes = random.integers(0, top + 1, (k, n), dtype=np.uint8)
    zeros = random.integers(smallest_zero, top + 1, (groups, n), dtype=np.uint8)
    if scheme.sym:
        zeros[:] = (top + 1) // 2
    scales = (random.standard_normal((groups, n)) * 0.1).astype(np.float16)
    g_idx = (np.arange(k) // size).astype(np.int32)
    if scheme.desc_act:
        random.shuffle(g_idx)
    stored_zeros = zeros if scheme.checkpoint_format == "gptq_v2" else ((zeros.astype(int) - 1) & top).astype(np.uint8)
    tensors = {
        "qweight": oracle.pack_rows(codes, scheme.bits),
        "qzeros": oracle.pack_columns(stored_zeros, scheme.bits),
        "scales": scales,
        "g_idx": g_idx,
    }
    return Layer(
        scheme,
        LinearShape(n, k),
        {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in tensors.items()},
        codes,
        zeros,
        g_idx,
    )
