"""
The canonical layout: the numeric contract between formats and kernels, as tensors.

A scheme decodes checkpoint tensors into a `Weight`, a kernel prepares a `Weight` for itself. It is transient: one layer
at a time exists in this form.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from quantplug.spec import LinearProblem, PerChannel, PerGroup, PerTensor, WeightSpec

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True, slots=True, eq=False)
class Weight:
    """
    One weight (one segment of a fused layer) in canonical form: `value = (code - zero) * scale`.

    Attributes:
        codes: `[N, K]`, one element per byte: uint8 with zeros, int8 without. Logical shape only: strides are free,
            also below (a decoder may hand over the transposed view of a `[K, N]` buffer), so a kernel must not assume
            them.
        scales: `[N, G]` in the stored dtype. G is ceil(K / g), or with `g_idx` the number of groups it addresses.
        spec: the contract the tensors obey.
        zeros: uint8 `[N, G]`, or None for signed codes.
        g_idx: int32 `[K]`, group of each input; None when it is the trivial `k // g`.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    spec: WeightSpec
    zeros: torch.Tensor | None = None
    g_idx: torch.Tensor | None = None

    @property
    def out_features(self) -> int:
        """N."""
        return self.codes.shape[0]

    @property
    def in_features(self) -> int:
        """K."""
        return self.codes.shape[1]

    def group_index(self) -> torch.Tensor:
        """Return int64 `[K]`, the column of `scales` that belongs to each input."""
        if self.g_idx is not None:
            return self.g_idx.to(torch.int64)
        k = torch.arange(self.in_features, device=self.codes.device)
        match self.spec.granularity:
            case PerTensor() | PerChannel():
                return torch.zeros_like(k)
            case PerGroup(size=size):
                return k // size

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """
        Return the values `[N, K]`, computed in float32 and rounded once to `dtype`.

        Plain and obvious on purpose: this is what the `reference` kernel multiplies with.
        """
        index = self.group_index()
        values = self.codes.to(torch.float32)
        if self.zeros is not None:
            values -= self.zeros.to(torch.float32)[:, index]
        values *= self.scales.to(torch.float32)[:, index]
        return values.to(dtype)


@dataclass(frozen=True, slots=True, eq=False)
class Prepared:
    """
    One layer in the layout of a kernel.

    Attributes:
        layout_id: names the layout; kernels with the same id can run the same `Prepared`.
        problem: what it was prepared for.
        tensors: the kernel's own tensors by name, on the device they run on.
        meta: the kernel's own plain facts (sizes, flags).
    """

    layout_id: str
    problem: LinearProblem
    tensors: Mapping[str, torch.Tensor]
    meta: Mapping[str, int] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes the tensors occupy."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())
