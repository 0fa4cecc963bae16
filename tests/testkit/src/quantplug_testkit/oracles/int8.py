"""
Integers stored one per byte: `value = (code - zero) * scale`, the scale of a tensor, a row, a group or a block.

A worked example: one row of four 4-bit codes in groups of two, zero points -1 and 2.

>>> codes = np.array([[-8, 7, 0, 3]], np.int8)
>>> dequantize(codes, [[0.5, 2.0]], [[-1, 2]], rows=1, inputs=2)[0].tolist()
[-3.5, 4.0, -4.0, 2.0]

What a static, asymmetric activation does to x: codes of 8 bits, raised by 128 so that they and their zero point are
unsigned. The stored zero point is -28.

>>> quantize_input([-1.0, 0.0, 0.3, 100.0], scale=0.5, zero=-28)
[98, 100, 101, 255]
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import ArrayLike, NDArray

Array = np.ndarray[Any, Any]


def dequantize(codes: Array, scales: ArrayLike, zeros: ArrayLike | None, rows: int, inputs: int) -> NDArray[np.float64]:
    """
    Return the values, float64 `[N, K]`; exact, for scales of at most 24 significant bits.

    Args:
        codes: int8 `[N, K]`.
        scales: `[ceil(N / rows), ceil(K / inputs)]`, any float.
        zeros: int8 in the same shape, or None for 0.
        rows: output rows that share a scale.
        inputs: inputs that share a scale.
    """
    multipliers = np.asarray(scales, np.float64)
    points = np.zeros(multipliers.shape, np.int64) if zeros is None else np.asarray(zeros, np.int64)
    values = np.empty(codes.shape, np.float64)
    for n in range(codes.shape[0]):
        for k in range(codes.shape[1]):
            place = n // rows, k // inputs
            values[n, k] = (int(codes[n, k]) - int(points[place])) * float(multipliers[place])
    return values


def quantize_input(x: Sequence[float], scale: float, zero: int) -> list[int]:
    """Return unsigned 8-bit codes of x, given the stored scale and the stored int8 zero point; ties go to even."""
    return [int(min(255, max(0, np.rint(value / scale) + zero + 128))) for value in x]
