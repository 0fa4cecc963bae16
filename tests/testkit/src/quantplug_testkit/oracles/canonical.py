"""
What a weight in canonical form means: `value = (code - zero) * scale`.

A worked example, one row of three inputs in groups of two, zero points 8 and 0:

>>> row = Segment.of(codes=[[9, 6, 3]], scales=[[0.5, 2.0]], zeros=[[8, 0]], g_idx=None, group_size=2, bits=4)
>>> row.index.tolist()
[0, 0, 1]
>>> row.values().tolist()
[[0.5, -1.0, 6.0]]
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

Floats = np.ndarray[Any, np.dtype[np.float64]]
Integers = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True, slots=True, eq=False)
class Segment:
    """
    One weight as plain numbers.

    Attributes:
        codes: int64 `[N, K]`, the codes' integer values.
        scales: float64 `[N, G]`, or `[1, 1]` when one scale serves the whole weight.
        zeros: int64 in the shape of `scales`; all 0 for signed codes.
        index: int64 `[K]`, the column of `scales` that belongs to each input.
        bits: width of one code.
        signed: whether codes are signed, and so have no zero points.
    """

    codes: Integers
    scales: Floats
    zeros: Integers
    index: Integers
    bits: int
    signed: bool

    @classmethod
    def of(
        cls,
        codes: ArrayLike,
        scales: ArrayLike,
        zeros: ArrayLike | None,
        g_idx: ArrayLike | None,
        group_size: int,
        bits: int,
    ) -> Segment:
        """
        Build a segment from stored numbers; they are converted exactly.

        Args:
            codes: `[N, K]`.
            scales: `[N, G]` or `[1, 1]`.
            zeros: as `scales`, or None for signed codes.
            g_idx: `[K]`, or None when input k belongs to group `k // group_size`.
            group_size: inputs per group; -1 for one group over all of K.
            bits: width of one code.
        """
        stored = np.asarray(codes, np.int64)
        index = group_index(stored.shape[1], group_size) if g_idx is None else np.asarray(g_idx, np.int64)
        multipliers = np.asarray(scales, np.float64)
        points = np.zeros(multipliers.shape, np.int64) if zeros is None else np.asarray(zeros, np.int64)
        return cls(stored, multipliers, points, index, bits, zeros is None)

    def scale(self) -> Floats:
        """Return the scale of each element, float64 `[N, K]`."""
        return np.broadcast_to(self.scales[:, self.index], self.codes.shape)

    def zero(self) -> Integers:
        """Return the zero point of each element, int64 `[N, K]`."""
        return np.broadcast_to(self.zeros[:, self.index], self.codes.shape)

    def values(self) -> Floats:
        """
        Return the values `[N, K]`, float64.

        Exact: an integer of 9 bits times a scale of at most 24 bits fits into 53.
        """
        return (self.codes - self.zero()) * self.scale()


def group_index(in_features: int, group_size: int) -> NDArray[np.int64]:
    """Return the group of each input, int64 `[K]`; -1 means one group."""
    return np.array([0 if group_size == -1 else k // group_size for k in range(in_features)], np.int64)
