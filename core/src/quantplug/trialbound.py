"""
How far a result may be from the exact one, element by element: what follows from K, dtypes and declared roundings.

The testkit derives the same bound with every rounding looked at by itself (`quantplug_testkit.bounds`, which shares no
code with this); here each is taken at its largest, which is quick on large layers.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from quantplug.kernel import Cast
    from quantplug.weight import Weight

_PIECE_ROWS = 2048
_FLOAT32 = 2.0**-24
_MORE_ROUNDINGS = 8
"""Roundings in float32 beside adding up K products: of a value (4), a product, its scale, a sum of integers, a bias."""

# What the tensor cores of Ada and Hopper GPUs cut off of sums of 8-bit floats, and the smallest magnitude they see.
_CUT_OFF = 144 * 2.0**-13
_SMALLEST_CODE = 2.0**-6


class Exact:
    """
    The exact result for some rows, and how far from it a kernel with given casts may be.

    Args:
        x: `[M, K]`.
        values: float32 `[N, K]`, the exact values of the weight.
        weights: the weight's segments.
        bias: `[N]` or None.
    """

    def __init__(
        self, x: torch.Tensor, values: torch.Tensor, weights: Sequence[Weight], bias: torch.Tensor | None
    ) -> None:
        self._x = x
        self._values = values
        self._weights = weights
        self._product = _product(x, values)
        self._bias = torch.zeros((), dtype=torch.float64, device=x.device) if bias is None else bias.to(torch.float64)
        self._bounds: dict[tuple[Cast, ...], torch.Tensor] = {}

    def compare(self, y: torch.Tensor, casts: tuple[Cast, ...]) -> str:
        """Return what is wrong with y `[R, N]` for x whose rows repeat, "" when nothing is."""
        exact = self._product + self._bias
        if tuple(y.shape[1:]) != tuple(exact.shape[1:]) or y.dtype != self._x.dtype:
            return f"y is {list(y.shape)} in {y.dtype}"
        if casts not in self._bounds:
            self._bounds[casts] = self._bound({cast.what: _Unit(cast.dtype) for cast in casts})
        index = torch.arange(y.shape[0], device=y.device) % exact.shape[0]
        for begin in range(0, y.shape[0], _PIECE_ROWS):
            rows = index[begin : begin + _PIECE_ROWS]
            # A NaN is not within any bound.
            off = ~((y[begin : begin + len(rows)].to(torch.float64) - exact[rows]).abs() <= self._bounds[casts][rows])
            if bool(off.any()):
                row, column = (int(number) for number in off.nonzero()[0])
                found, wanted = float(y[begin + row, column]), float(exact[rows[row], column])
                allowed = float(self._bounds[casts][rows[row], column])
                return (
                    f"with {y.shape[0]} rows, y[{begin + row}, {column}] is {found:.6g}, "
                    f"not {wanted:.6g} within {allowed:.2g} ({int(off.sum())} elements are off)"
                )
        return ""

    def _bound(self, casts: dict[str, _Unit]) -> torch.Tensor:
        magnitude, error = self._values.abs(), torch.zeros_like(self._values)
        offset = self._offsets() if "zeros" in casts else None
        if "scales" in casts:
            error += casts["scales"].roundoff * (magnitude if offset is None else magnitude + offset)
        if offset is not None:
            error += casts["zeros"].roundoff * offset * (1 + 2.0**-8) + casts["zeros"].half_smallest
        if "weights" in casts:
            error += casts["weights"].roundoff * (magnitude + error) + casts["weights"].half_smallest
        x = self._x.abs()
        parts = magnitude + error if offset is None else magnitude + error + 2 * offset
        total = _product(x, parts) + self._bias.abs()
        count = (x.shape[1] + _MORE_ROUNDINGS) * _FLOAT32
        bound = _product(x, error) + total * count / (1 - count) + torch.finfo(torch.float32).tiny * x.shape[1]
        if "accumulator" in casts:
            least = max(float(weight.scale_values().abs().max()) for weight in self._weights) * _SMALLEST_CODE
            seen = torch.where(x > 0, x + _SMALLEST_CODE * float(x[x > 0].min()), x)
            bound += _CUT_OFF * _product(seen, magnitude + least)
        if "partials" in casts:
            bound += casts["partials"].roundoff * (self._product.abs() + bound) + casts["partials"].half_smallest
        stored = _Unit(str(self._x.dtype).removeprefix("torch."))
        return bound + stored.roundoff * ((self._product + self._bias).abs() + bound) + stored.half_smallest

    def _offsets(self) -> torch.Tensor:
        """Return the magnitudes `|mid - zero| * |scale|`, float32 `[N, K]`."""
        found = []
        for weight in self._weights:
            middle = torch.full_like(weight.codes, 1 << weight.spec.element.bits - 1 if weight.zeros is not None else 0)
            found.append(replace(weight, codes=middle).dequantize().abs().to(self._values.device))
        return torch.cat(found)


class _Unit:
    """The unit roundoff of a dtype, and half of its smallest subnormal."""

    __slots__ = ("half_smallest", "roundoff")

    def __init__(self, dtype: str) -> None:
        if not hasattr(torch, dtype):
            # That of an accumulator, which is looked at by itself.
            self.roundoff = self.half_smallest = 0.0
            return
        info = torch.finfo(getattr(torch, dtype))
        self.roundoff = info.eps / 2
        self.half_smallest = info.smallest_normal * info.eps / 2


def _product(x: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Return x V^T in float64, for a V that need not fit into memory twice."""
    wide = x.to(torch.float64)
    return torch.cat([wide @ piece.to(torch.float64).t() for piece in values.split(_PIECE_ROWS)], dim=1)
