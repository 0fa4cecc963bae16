"""
Blocks of the q4_0 grid whose weights are a few of their dtype's smallest units, or nothing but zeros.

There, rounding merges neighbouring multiples of the scale, and no code follows from a quotient. But few scales differ
in what they can give: between two places where some `code * scale` is a tie, all of them give the same values. One
scale for every such stretch and every tie makes a table, in which blocks are looked up.
"""

from __future__ import annotations

from fractions import Fraction
from functools import cache
from itertools import pairwise
from typing import NamedTuple

import torch

from quantplug_compressed_tensors.floats import unit

LARGEST = 32
"""Largest weight in the table, in units of the dtype's smallest number."""
_CODES = range(-8, 8)
# With the code of the largest weight doubled or tripled where it is small, no scale in units need exceed this.
_LARGEST_SCALE = 9
_NEGATIVE_ZERO = 2 * LARGEST + 1
_COLUMNS = 2 * LARGEST + 2


class _Table(NamedTuple):
    """
    What scales can give.

    Attributes:
        scales: float32 `[T]`.
        lacks: float32 `[66, T]`, 1 where a scale does not give the value of that column.
        codes: float32 `[T, 66]`, a code that gives the value where there is one.
    """

    scales: torch.Tensor
    lacks: torch.Tensor
    codes: torch.Tensor


def look_up(values: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Find scales and codes that give blocks back, the signs of zeros included.

    Args:
        values: float32 `[B, 32]`, at most `LARGEST` units each.
        dtype: what the values are rounded to.

    Returns:
        Bool `[B]`, which blocks have a scale; and codes `[F, 32]` and scales `[F]`, float32, of those.
    """
    table = _table(dtype)
    columns = (values / unit(dtype)).long() + LARGEST
    columns[(values == 0) & torch.signbit(values)] = _NEGATIVE_ZERO
    present = torch.zeros(len(values), _COLUMNS).scatter_(1, columns, 1.0)
    suited = (present @ table.lacks) == 0
    found = suited.any(1)
    chosen = suited[found].to(torch.uint8).argmax(1)
    return found, table.codes[chosen].gather(1, columns[found]), table.scales[chosen]


@cache
def _table(dtype: torch.dtype) -> _Table:
    scales = [Fraction(0), *_candidates(dtype)]
    lacks, codes = torch.ones(_COLUMNS, 2 * len(scales)), torch.zeros(2 * len(scales), _COLUMNS)
    for row, scale in enumerate(scales):
        for sign, at in ((1, row), (-1, len(scales) + row)):
            for code in sorted(_CODES, key=abs, reverse=True):
                product = round(abs(code) * scale)
                negative = code * sign < 0 or (code == 0 and sign < 0)
                if product <= LARGEST:
                    column = _NEGATIVE_ZERO if product == 0 and negative else LARGEST + product * (-1) ** negative
                    lacks[column, at], codes[at, column] = 0, code
    numbers = torch.tensor([float(scale) for scale in scales]) * unit(dtype)
    return _Table(torch.cat([numbers, -numbers]), lacks, codes)


def _candidates(dtype: torch.dtype) -> list[Fraction]:
    """Return scales in units, those with the fewest bits first: one for every tie and every stretch between two."""
    if dtype == torch.float32:
        return [Fraction(scale) for scale in range(1, _LARGEST_SCALE + 1)]  # the scale has no smaller unit itself
    ties = {Fraction(2 * n + 1, 2 * code) for code in range(1, 9) for n in range(_LARGEST_SCALE * code)}
    edges = sorted({Fraction(0), *ties})
    between = [_simplest_between(low, high) for low, high in pairwise(edges)]
    # A tie at a third or a seventh of a unit is met by no binary number.
    met = [tie for tie in ties if tie.denominator.bit_count() == 1]
    return sorted({*between, *met}, key=lambda scale: (scale.denominator, scale))


def _simplest_between(low: Fraction, high: Fraction) -> Fraction:
    """Return the number between two others whose denominator is the smallest power of two."""
    denominator = 1
    while (number := Fraction(int(low * denominator) + 1, denominator)) >= high:
        denominator *= 2
    return number
