"""
The canonical layout: the numeric contract between formats and kernels, as tensors.

A scheme decodes checkpoint tensors into a `Weight`, a kernel prepares a `Weight` for itself. It is transient: one layer
at a time exists in this form.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from quantplug.codes import code_values
from quantplug.spec import LinearProblem, PerBlock, PerChannel, PerGroup, PerTensor, WeightSpec

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


@dataclass(frozen=True, slots=True, eq=False)
class Weight:
    """
    One weight (one segment of a fused layer) in canonical form: `value = (code - zero) * scale [* global_scale]`.

    Attributes:
        codes: `[N, K]`, one element per byte: uint8 with zeros, int8 without; one of torch's float8 dtypes; or uint8
            with the four bits of a float4_e2m1fn code in the low nibble. Logical shape only: strides are free, also
            below (a decoder may hand over the transposed view of a `[K, N]` buffer), so a kernel must not assume them.
        scales: as `scale_shape` says, in the stored dtype; a scale always multiplies. With `g_idx`, `[N, G]` where G is
            the number of groups it addresses. Where the file stores float32 divisors, they are the reciprocals in
            float64: the float32 that each rounds to multiplies, and the divisor itself comes back from it.
        spec: the contract the tensors obey.
        zeros: uint8, of the shape of the scales, or None for signed codes.
        g_idx: int32 `[K]`, group of each input; None when it is the trivial `k // g`.
        global_scale: scalar that multiplies every scale, or None. It is float32 where the file stores it as it is, and
            float64 where the file stores its reciprocal: `scale * (1 / g)` then rounds to the float32 that `scale / g`
            rounds to, and `g` itself comes back from it.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    spec: WeightSpec
    zeros: torch.Tensor | None = None
    g_idx: torch.Tensor | None = None
    global_scale: torch.Tensor | None = None

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
            case PerGroup(size=size) | PerBlock(k=size):
                return k // size

    def scale_values(self) -> torch.Tensor:
        """Return float32 `[N or 1, G]`, the scale of each row and group, times the global scale and rounded once."""
        scales = self._for_rows(self.scales)
        if self.global_scale is not None:
            scales = (scales.to(torch.float64) * self.global_scale).to(torch.float32)
        return scales

    def _for_rows(self, shared: torch.Tensor) -> torch.Tensor:
        """Return scales or zero points as float32 `[N or 1, G]`: those of a block once for each of its rows."""
        values = shared.to(torch.float32)
        if isinstance(self.spec.granularity, PerBlock):
            return values.repeat_interleave(self.spec.granularity.n, 0)[: self.out_features]
        return values

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """
        Return the values `[N, K]`, computed in float32 and rounded once to `dtype`.

        A global scale multiplies the scales first; that product is rounded to float32, too.

        Plain and obvious on purpose: this is what the `reference` kernel multiplies with.
        """
        index = self.group_index()
        values = code_values(self.codes, self.spec.element)
        if self.zeros is not None:
            values -= self._for_rows(self.zeros)[:, index]
        values *= self.scale_values()[:, index]
        return values.to(dtype)


@dataclass(frozen=True, slots=True, eq=False)
class ActivationParams:
    """
    What a file stores about the activations of one layer (one segment of a fused one).

    Attributes:
        scale: float32 scalar that multiplies the codes of x, for static scales; else None.
        zero: uint8 scalar, where static codes have a zero point; else None.
        global_scale: scalar that multiplies every scale of x (NVFP4), of the dtypes that a weight's has, or None.
    """

    scale: torch.Tensor | None = None
    zero: torch.Tensor | None = None
    global_scale: torch.Tensor | None = None


def stored_scales(problem: LinearProblem, activation: Sequence[ActivationParams | None]) -> list[float]:
    """
    Return the stored scale of x for each segment of a layer, none where scales are computed from x.

    Raises:
        ValueError: one is missing.
    """
    if problem.activation is None or problem.activation.dynamic:
        return []
    scales = [None if params is None or params.scale is None else float(params.scale) for params in activation]
    if None in scales:
        raise ValueError(f"a stored scale of x is missing: {scales}")
    return [scale for scale in scales if scale is not None]


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

    def into(self, out: Prepared | None) -> Prepared:
        """
        Return itself, or `out` once its memory holds these tensors: captured graphs read them there.

        Raises:
            ValueError: `out` has other tensors.
        """
        if out is None:
            return self
        if out.tensors.keys() != self.tensors.keys():
            was, now = sorted(out.tensors), sorted(self.tensors)
            raise ValueError(f"the layer has the tensors {', '.join(now)}, not {', '.join(was)} as before")
        for name, tensor in self.tensors.items():
            out.tensors[name].copy_(tensor)
        return out
