"""
Narrow floating-point formats: what each code stands for, and the nearest code for a number.

A code is a sign bit, exponent bits and fraction bits, from the highest to the lowest. With an exponent field of 0 it
stands for `fraction * 2^(1 - bias)` (a subnormal), else for `(1 + fraction) * 2^(exponent - bias)`. The formats differ
in their bias and in which codes are no finite numbers:

- float8_e4m3fn (bias 7): both codes of all ones behind the sign are NaN; there is no infinity.
- float8_e5m2 (bias 15): as in IEEE 754, the highest exponent holds the infinities and NaN.
- float8_e4m3fnuz (bias 8), float8_e5m2fnuz (bias 16): 0x80 is the only NaN; there is no infinity and no negative zero.
- float4_e2m1fn (bias 1): all codes are finite.
- float8_e8m0fnu: no sign, no fraction: `2^(code - 127)` from `2^-127` on, and 255 is NaN; it has no zero.

Sources: OCP 8-bit Floating Point 1.0, table 2; OCP Microscaling Formats 1.0, 5.3.3 and 5.4.1; Noune et al., 8-bit
Numerical Formats for Deep Neural Networks, section 2 (fnuz).

>>> decode(np.array([0x01, 0x7E, 0xC0], np.uint8), "float8_e4m3fn").tolist()
[0.001953125, 448.0, -2.0]
>>> decode(np.array([0, 127, 255], np.uint8), "float8_e8m0fnu").tolist()
[5.877471754111438e-39, 1.0, nan]

2.5 lies halfway between the codes 4 and 5, which stand for 2 and 3: the even code is taken. 7 is beyond the largest.

>>> encode(np.array([2.5, 7.0, -0.2]), "float4_e2m1fn").tolist()
[4, 7, 8]
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from quantplug_testkit.oracles.canonical import Floats

Codes = np.ndarray[Any, np.dtype[np.uint8]]


@dataclass(frozen=True, slots=True)
class _Layout:
    exponent: int
    fraction: int
    bias: int
    special: Literal["finite", "all ones", "ieee", "unsigned zero"]


_LAYOUTS = {
    "float8_e4m3fn": _Layout(4, 3, 7, "all ones"),
    "float8_e5m2": _Layout(5, 2, 15, "ieee"),
    "float8_e4m3fnuz": _Layout(4, 3, 8, "unsigned zero"),
    "float8_e5m2fnuz": _Layout(5, 2, 16, "unsigned zero"),
    "float4_e2m1fn": _Layout(2, 1, 1, "finite"),
}

_EXPONENT_ONLY = "float8_e8m0fnu"

FORMATS = (*_LAYOUTS, _EXPONENT_ONLY)
"""The formats, as torch spells them."""


@cache
def values(name: str) -> Floats:
    """Return what each code of a format stands for, float64 `[2^bits]`, read-only."""
    if name == _EXPONENT_ONLY:
        table = np.array([*(2.0 ** (code - 127) for code in range(255)), np.nan])
    else:
        layout = _LAYOUTS[name]
        table = np.array([_value(code, layout) for code in range(2 << (layout.exponent + layout.fraction))])
    table.flags.writeable = False
    return table


def decode(codes: Codes, name: str) -> Floats:
    """Return what codes of any shape stand for, float64."""
    return values(name)[codes]


def largest(name: str) -> float:
    """Return the largest finite value."""
    return float(np.nanmax(np.where(np.isinf(values(name)), np.nan, values(name))))


def largest_exponent(name: str) -> int:
    """Return the exponent of the largest finite value, `floor(log2(largest))`: emax of the OCP specifications."""
    return int(np.frexp(largest(name))[1]) - 1


def encode(numbers: Floats, name: str) -> Codes:
    """
    Return the nearest code of each number, uint8; on a tie the even one.

    What is beyond the largest finite value, infinities included, becomes that value: the saturating conversion of the
    OCP specifications. The sign of a zero is kept where the format has one. float8_e8m0fnu takes positive numbers; a
    number halfway between two powers of two is 1.5 times the lower, and 1.5 goes to 2, the even one.

    Raises:
        ValueError: a NaN for a format without one, or a negative number or zero for float8_e8m0fnu.
    """
    table = values(name)
    magnitudes = table if name == _EXPONENT_ONLY else table[: table.size // 2]
    finite = magnitudes[np.isfinite(magnitudes)]
    size = np.minimum(np.abs(numbers), finite[-1])
    halfway = (finite[1:] + finite[:-1]) / 2
    below = np.searchsorted(halfway, size, side="left")
    tie = np.isin(size, halfway)
    if name == _EXPONENT_ONLY:
        if (numbers <= 0).any():
            raise ValueError(f"{name} has neither zero nor negative numbers")
        return _with_nan(below + tie, numbers, 255)
    nearest = below + (tie & (below % 2 == 1))
    negative = np.signbit(numbers) & ((nearest > 0) | (_LAYOUTS[name].special != "unsigned zero"))
    codes = nearest + negative * (table.size // 2)
    nan = np.flatnonzero(np.isnan(table))
    if np.isnan(numbers).any() and not nan.size:
        raise ValueError(f"{name} has no NaN")
    return _with_nan(codes, numbers, int(nan[0]) if nan.size else 0)


def _with_nan(codes: NDArray[np.int64], numbers: Floats, nan: int) -> Codes:
    return np.where(np.isnan(numbers), nan, codes).astype(np.uint8)


def _value(code: int, layout: _Layout) -> float:
    fraction = code & ((1 << layout.fraction) - 1)
    exponent = (code >> layout.fraction) & ((1 << layout.exponent) - 1)
    negative = bool(code >> (layout.fraction + layout.exponent))
    ones = (1 << layout.exponent) - 1
    match layout.special:
        case "all ones" if exponent == ones and fraction == (1 << layout.fraction) - 1:
            return float("nan")
        case "ieee" if exponent == ones:
            return float("nan") if fraction else (-float("inf") if negative else float("inf"))
        case "unsigned zero" if negative and exponent == fraction == 0:
            return float("nan")
    part = fraction / (1 << layout.fraction)
    magnitude = part * 2.0 ** (1 - layout.bias) if exponent == 0 else (1 + part) * 2.0 ** (exponent - layout.bias)
    return -magnitude if negative else magnitude
