"""
What a weight in canonical form means: `value = (code - zero) * scale * global_scale`.

A worked example, one row of three inputs in groups of two, zero points 8 and 0:

>>> row = Segment.of(codes=[[9, 6, 3]], scales=[[0.5, 2.0]], zeros=[[8, 0]], g_idx=None, group_size=2, bits=4)
>>> row.index.tolist()
[0, 0, 1]
>>> row.values().tolist()
[[0.5, -1.0, 6.0]]

Three rows of three inputs in blocks of two by two; blocks at the edges are ragged:

>>> scales = [[1.0, 10.0], [100.0, 1000.0]]
>>> tiles = Segment.of(np.ones((3, 3)), scales, zeros=None, g_idx=None, group_size=2, bits=8, block_rows=2)
>>> tiles.values().tolist()
[[1.0, 1.0, 10.0], [1.0, 1.0, 10.0], [100.0, 100.0, 1000.0]]
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
        codes: float64 `[N, K]`, what the codes stand for: integers, or the values of floating-point codes.
        scales: float64 `[R, G]`, a row for each output, for each block of them, or one for all.
        zeros: int64 in the shape of `scales`; all 0 for signed codes.
        rows: int64 `[N]`, the row of `scales` that belongs to each output.
        index: int64 `[K]`, the column of `scales` that belongs to each input.
        bits: width of one code.
        signed: whether codes are signed, and so have no zero points.
        global_scale: what multiplies every scale; 1 where there is none.
    """

    codes: Floats
    scales: Floats
    zeros: Integers
    rows: Integers
    index: Integers
    bits: int
    signed: bool
    global_scale: float = 1.0

    @classmethod
    def of(
        cls,
        codes: ArrayLike,
        scales: ArrayLike,
        zeros: ArrayLike | None,
        g_idx: ArrayLike | None,
        group_size: int,
        bits: int,
        *,
        block_rows: int = 1,
        global_scale: float = 1.0,
    ) -> Segment:
        """
        Build a segment from stored numbers; they are converted exactly.

        Args:
            codes: `[N, K]`, see `floats.decode` for floating-point codes.
            scales: `[N, G]`, `[ceil(N / block_rows), G]` or `[1, 1]`.
            zeros: as `scales`, or None for signed codes.
            g_idx: `[K]`, or None when input k belongs to group `k // group_size`.
            group_size: inputs per group; -1 for one group over all of K.
            bits: width of one code.
            block_rows: outputs that share a row of scales.
            global_scale: what multiplies every scale.
        """
        stored = np.asarray(codes, np.float64)
        index = group_index(stored.shape[1], group_size) if g_idx is None else np.asarray(g_idx, np.int64)
        multipliers = np.asarray(scales, np.float64)
        points = np.zeros(multipliers.shape, np.int64) if zeros is None else np.asarray(zeros, np.int64)
        outputs = np.arange(stored.shape[0], dtype=np.int64)
        rows = outputs // block_rows if multipliers.shape[0] > 1 else np.zeros_like(outputs)
        return cls(stored, multipliers, points, rows, index, bits, zeros is None, global_scale)

    def stored_scale(self) -> Floats:
        """Return the scale of each element as it is stored, without the global scale, float64 `[N, K]`."""
        return self.scales[self.rows][:, self.index]

    def scale(self) -> Floats:
        """Return the scale of each element, the global scale included, float64 `[N, K]`."""
        return self.stored_scale() * self.global_scale

    def zero(self) -> Integers:
        """Return the zero point of each element, int64 `[N, K]`."""
        return self.zeros[self.rows][:, self.index]

    def values(self) -> Floats:
        """
        Return the values `[N, K]`, float64.

        Exact without a global scale: a code less its zero point has at most 9 bits, a scale 24. With one there are two
        roundings to 53 bits.
        """
        return (self.codes - self.zero()) * self.scale()


def group_index(in_features: int, group_size: int) -> NDArray[np.int64]:
    """Return the group of each input, int64 `[K]`; -1 means one group."""
    return np.array([0 if group_size == -1 else k // group_size for k in range(in_features)], np.int64)
