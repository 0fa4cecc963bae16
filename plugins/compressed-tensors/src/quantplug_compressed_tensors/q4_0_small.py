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


def look_up(values: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Find scales and codes that give blocks back; of several scales, one with few bits.

    Args:
        values: float32 `[B, 32]`, at most `LARGEST` units each.
        dtype: what the values are rounded to.

    Returns:
        Codes `[B, 32]` and scales `[B]`, float32; and bool `[B]` twice: whether they give every value back, and whether
        the signs of zeros, too.
    """
    table = _table(dtype)
    zero = values == 0
    columns = (values / unit(dtype)).long() + LARGEST
    columns[zero & torch.signbit(values)] = _NEGATIVE_ZERO
    present = torch.zeros(len(values), _COLUMNS).scatter_(1, columns, 1.0)
    exact = (present @ table.lacks) == 0
    present[:, (LARGEST, _NEGATIVE_ZERO)] = 0  # a code of 0 gives a zero in any case, perhaps of the other sign
    close = (present @ table.lacks) == 0
    signs = exact.any(1)
    chosen = torch.where(signs.unsqueeze(1), exact, close).to(torch.uint8).argmax(1)
    return table.codes[chosen].gather(1, columns), table.scales[chosen], close.any(1), signs


@cache
def _table(dtype: torch.dtype) -> _Table:
    candidates = _candidates(dtype)
    lacks, codes = torch.ones(_COLUMNS, len(candidates)), torch.zeros(len(candidates), _COLUMNS)
    for row, (scale, sign) in enumerate(candidates):
        for code in sorted(_CODES, key=abs, reverse=True):
            product = round(abs(code) * scale)
            negative = code * sign < 0 or (code == 0 and sign < 0)
            if product <= LARGEST:
                column = _NEGATIVE_ZERO if product == 0 and negative else LARGEST + product * (-1) ** negative
                lacks[column, row], codes[row, column] = 0, code
    scales = torch.tensor([sign * float(scale) for scale, sign in candidates]) * unit(dtype)
    return _Table(scales, lacks, codes)


def _candidates(dtype: torch.dtype) -> list[tuple[Fraction, int]]:
    """
    Return scales in units, with their signs, those with the fewest bits first.

    One for every tie and every stretch between two; and whole numbers of units, which the dtype of the weights holds.
    """
    whole = {Fraction(number) for number in range(LARGEST + 1)}
    scales = whole if dtype == torch.float32 else whole | _between_ties()  # float32 has no smaller unit for the scale
    return sorted(((scale, sign) for scale in scales for sign in (1, -1)), key=lambda s: (s[0].denominator, s))


def _between_ties() -> set[Fraction]:
    ties = {Fraction(2 * n + 1, 2 * code) for code in range(1, 9) for n in range(_LARGEST_SCALE * code)}
    between = {_simplest_between(low, high) for low, high in pairwise(sorted({Fraction(0), *ties}))}
    # A tie at a third or a seventh of a unit is met by no binary number.
    return between | {tie for tie in ties if tie.denominator.bit_count() == 1}


def _simplest_between(low: Fraction, high: Fraction) -> Fraction:
    """Return the number between two others whose denominator is the smallest power of two."""
    denominator = 1
    while (number := Fraction(int(low * denominator) + 1, denominator)) >= high:
        denominator *= 2
    return number
