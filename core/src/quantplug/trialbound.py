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
_CUT_OFF_IN_STEP, _STEP = 18 * 2.0**-13, 16
_SMALLEST_CODE = 2.0**-6

_SHORTEST_PART = 64
"""Inputs of the shortest part that a sum over K is cut into."""


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
        self._operands = values, weights, bias
        self._found: dict[tuple[Cast, ...], tuple[torch.Tensor, torch.Tensor]] = {}

    def compare(self, y: torch.Tensor, casts: tuple[Cast, ...]) -> str:
        """Return what is wrong with y `[R, N]` for x whose rows repeat, "" when nothing is."""
        if casts not in self._found:
            exact, error = linear_error(self._x, None, *self._operands, units_of(casts))
            self._found[casts] = exact, stored(exact, error, self._x.dtype)
        return compare(y, *self._found[casts], self._x.dtype)


def compare(y: torch.Tensor, exact: torch.Tensor, bound: torch.Tensor, dtype: torch.dtype) -> str:
    """Return what is wrong with y `[R, N]`, "" when nothing is; its rows repeat those of `exact` and `bound`."""
    if tuple(y.shape[1:]) != tuple(exact.shape[1:]) or y.dtype != dtype:
        return f"y is {list(y.shape)} in {y.dtype}"
    index = torch.arange(y.shape[0], device=y.device) % exact.shape[0]
    for begin in range(0, y.shape[0], _PIECE_ROWS):
        rows = index[begin : begin + _PIECE_ROWS]
        # A NaN is not within any bound.
        off = ~((y[begin : begin + len(rows)].to(torch.float64) - exact[rows]).abs() <= bound[rows])
        if bool(off.any()):
            row, column = (int(number) for number in off.nonzero()[0])
            found, wanted = float(y[begin + row, column]), float(exact[rows[row], column])
            allowed = float(bound[rows[row], column])
            return (
                f"with {y.shape[0]} rows, y[{begin + row}, {column}] is {found:.6g}, "
                f"not {wanted:.6g} within {allowed:.2g} ({int(off.sum())} elements are off)"
            )
    return ""


def linear_error(
    x: torch.Tensor,
    x_error: torch.Tensor | None,
    values: torch.Tensor,
    weights: Sequence[Weight],
    bias: torch.Tensor | None,
    units: dict[str, Unit],
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Return the exact `x V^T + b`, float64 `[M, N]`, and how far from it a result may be before it is stored.

    Args:
        x: `[M, K]`, exactly.
        x_error: `[M, K]`, how far what is multiplied may be from x; None for not at all.
        values: float32 `[N, K]`.
        weights: the segments that they are the values of.
        bias: `[N]` or None.
        units: of the roundings that are declared.
    """
    magnitude, error = values.abs(), torch.zeros_like(values)
    offset = _offsets(weights, values.device) if "zeros" in units else None
    if "scales" in units:
        error += units["scales"].roundoff * (magnitude if offset is None else magnitude + offset)
    if offset is not None:
        error += units["zeros"].roundoff * offset * (1 + 2.0**-8) + units["zeros"].half_smallest
    if "weights" in units:
        error += units["weights"].roundoff * (magnitude + error) + units["weights"].half_smallest
    product, size = _product(x, values), x.abs()
    exact = product if bias is None else product + bias.to(torch.float64)
    parts = magnitude + error if offset is None else magnitude + error + 2 * offset
    bound = _product(size, error)
    if x_error is not None:
        bound += _product(x_error, parts)
        size = size + x_error
    total = _product(size, parts) if bias is None else _product(size, parts) + bias.to(torch.float64).abs()
    count = (x.shape[1] + _MORE_ROUNDINGS) * _FLOAT32
    bound += total * count / (1 - count) + torch.finfo(torch.float32).tiny * x.shape[1]
    if "accumulator" in units or "long_accumulator" in units:
        cut_off = _CUT_OFF if "accumulator" in units else _CUT_OFF_IN_STEP * -(-x.shape[1] // _STEP)
        least = max(float(weight.scale_values().abs().max()) for weight in weights) * _SMALLEST_CODE
        seen = torch.where(size > 0, size + _SMALLEST_CODE * float(size.max()), size)
        bound += cut_off * _product(seen, magnitude + least)
    if "splits" in units:
        # Each part is rounded, and so is every sum of two of them; as many small ones as there are parts.
        cut = -(-x.shape[1] // _SHORTEST_PART)
        bound += ((1 + units["splits"].roundoff) ** cut - 1) * (total + bound)
        bound += 2 * cut * units["splits"].half_smallest
    if "partials" in units:
        bound += units["partials"].roundoff * (product.abs() + bound) + units["partials"].half_smallest
    return exact, bound


def stored(exact: torch.Tensor, error: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return how far a result may be that is off by `error` before it is stored in a dtype."""
    unit = Unit(str(dtype).removeprefix("torch."))
    return error + unit.roundoff * (exact.abs() + error) + unit.half_smallest


def units_of(casts: Sequence[Cast]) -> dict[str, Unit]:
    """Return the roundings that a kernel declares, by what is rounded."""
    return {cast.what: Unit(cast.dtype) for cast in casts}


def _offsets(weights: Sequence[Weight], device: torch.device) -> torch.Tensor:
    """Return the magnitudes `|mid - zero| * |scale|`, float32 `[N, K]`."""
    found = []
    for weight in weights:
        middle = torch.full_like(weight.codes, 1 << weight.spec.element.bits - 1 if weight.zeros is not None else 0)
        found.append(replace(weight, codes=middle).dequantize().abs().to(device))
    return torch.cat(found)


class Unit:
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
