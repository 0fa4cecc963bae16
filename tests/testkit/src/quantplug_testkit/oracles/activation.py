"""
What x becomes when a kernel quantizes it as a file permits, and how far a kernel that does so rightly may be from that.

Each element becomes `(code - zero) * scale * global_scale` with the code nearest to `x / (scale * global_scale)`, ties
to even, limited to the range of the element type: a signed integer of b bits goes from `-2^(b-1)` to `2^(b-1) - 1`, a
floating-point type saturates at its largest value. The scale is

- static: stored, and so is the zero point of unsigned codes; one for all of x.
- dynamic: `amax / top`, for amax the largest magnitude of the tensor, the token (a row) or the group (consecutive
  inputs of a row; the last group may be short), and top the largest code, 127 for int8, 448 for float8_e4m3fn, 6 for
  float4_e2m1fn. It is computed in float32 and never below `2^-126`, the smallest normal number: so rows of zeros have
  one. Source: vLLM and SGLang, dynamic_per_token quantization; where they differ is that bound from below.
- dynamic in float8_e4m3fn (NVFP4): `amax / top / global_scale`, rounded to the nearest; where that gives 0, x is 0.
  Source: compressed-tensors, calculate_qparams.
- dynamic in float8_e8m0fnu (MX): `2^(e - emax)`, emax the exponent of the largest code (8 for float8_e4m3fn, 2 for
  float4_e2m1fn) and e the exponent of amax, or one more where the significand of amax is above 1.75, for float4_e2m1fn
  also where it is 1.75. Limited to `2^-127 … 2^127`; a group of zeros has `2^-127`. For float8_e4m3fn this is
  `ceil(log2(amax / 448))`, as vLLM and SGLang compute it; compressed-tensors 0.20 (generate_mx_scales) steps up at 1.75
  for both types, so that for float8_e4m3fn and float8_e5m2 either is right there. OCP Microscaling Formats 1.0, 6.3,
  has the same power of two without any step, which cuts off up to an eighth of amax.

Where amax is NaN or infinite, so is the result of that tensor, token or group, and none of it is finite. A static scale
saturates infinities; a NaN it can show only where the element type has one.

Which evaluations are right. A kernel may divide by a scale or multiply by its reciprocal, which may be a constant: with
`u = 2^-24` and `gamma(n)` as in `bounds`,

- a dynamic scale in float32 is off by `gamma(2)`, and `x / scale` by `gamma(4)`: two roundings more;
- a static scale is known, and `x / scale` is off by `gamma(2)`;
- a global scale may be stored in more bits than float32. `amax / top / global_scale` is off by `gamma(5)`, and what is
  then rounded to float8_e4m3fn may be either of two neighbours; `scale * global_scale` is off by `gamma(2)` and
  `x / (scale * global_scale)` by `gamma(4)`;
- a power of two is exact, and so is dividing by it;
- a zero point may be added before rounding: `u (|x / scale| + zero)` more.

So the quotient lies in an interval, and the codes of both its ends are right: one code nearly always, two where a
boundary between codes lies in it. An x below `2^-126` may be flushed to zero. `Quantized.error` is the largest distance
of a right value from the one that exact arithmetic gives: the difference of two codes where there are two, and the
scale's own error. Nothing else is permitted.

An x that is itself a result, as what enters an expert's second product is, is known up to `off`. Then amax lies between
the largest `|x| - off` and the largest `|x| + off`, a scale between those that both of these give, and a quotient
between those of the ends: rounding to codes never decreases, so the codes of the two ends enclose all others. Where
scales are rounded and up to three of them are possible, each is tried by itself.

A worked example: amax is 127, so the scale is 1. 2.5 lies on a boundary and may become 2 or 3; 1.25 becomes 1.

>>> token = quantize(np.array([[127.0, 2.5, 1.25]]), Rule("int8", "token", dynamic=True))
>>> token.values.tolist()
[[127.0, 2.0, 1.0]]
>>> token.error.round(5).tolist()
[[2e-05, 1.0, 0.0]]

The same with powers of two: 120 has the exponent 6 and the significand 1.875, so the scale is 2^(7 - 8).

>>> group = quantize(np.array([[120.0, 2.6, 0.0]]), Rule("float8_e4m3fn", "group", True, 32, "float8_e8m0fnu"))
>>> group.values.tolist(), group.error.tolist()
([[120.0, 2.5, 0.0]], [[0.0, 0.0, 0.0]])
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from quantplug_testkit.oracles import floats

if TYPE_CHECKING:
    from collections.abc import Iterator

    from quantplug_testkit.oracles.canonical import Floats, Integers

_ROUNDOFF = 2.0**-24
_SMALLEST_NORMAL = 2.0**-126
_STEP_UP = 1.75
# whether an amax with exactly that significand steps up; None: either is right
_STEPS_AT_THE_TOP = {"float8_e4m3fn": None, "float8_e5m2": None, "float4_e2m1fn": True}


class Permission(Protocol):
    """How x is quantized; the core's `ActivationSpec` is one."""

    @property
    def element(self) -> str:
        """Type of the codes, as torch spells it."""

    @property
    def granularity(self) -> str:
        """What shares a scale: "tensor", "token" or "group"."""

    @property
    def dynamic(self) -> bool:
        """Whether scales are computed from x."""

    @property
    def group_size(self) -> int:
        """Inputs per scale for groups."""

    @property
    def scale_dtype(self) -> str:
        """What dynamic scales are rounded to; "float32" for not at all."""


@dataclass(frozen=True, slots=True)
class Rule:
    """A permission in plain terms."""

    element: str
    granularity: str
    dynamic: bool
    group_size: int = 0
    scale_dtype: str = "float32"


@dataclass(frozen=True, slots=True, eq=False)
class Quantized:
    """
    An x that products are made of.

    Attributes:
        values: float64 `[M, K]`.
        error: float64 `[M, K]`, how far the x of a right kernel may be from them.
        scale: float64 `[M, K]`, what codes are multiplied by, the largest that is right; 1 where nobody quantizes.
    """

    values: Floats
    error: Floats
    scale: Floats

    @classmethod
    def exactly(cls, x: Floats) -> Quantized:
        """Return an x that nobody quantizes."""
        return cls(x, np.zeros_like(x), np.ones_like(x))


def quantize(
    x: Floats,
    rule: Permission,
    *,
    scale: float | None = None,
    zero: int = 0,
    global_scale: float = 1.0,
    off: Floats | float = 0.0,
) -> Quantized:
    """
    Return what a finite x `[M, K]` becomes.

    Args:
        x: float64, exactly what the kernel is given.
        rule: how it is quantized.
        scale: the stored scale, for static ones.
        zero: the stored zero point, for unsigned codes.
        global_scale: what multiplies every scale.
        off: how far what a right kernel quantizes may be from x.

    Raises:
        ValueError: no rule says what is meant.
    """
    if rule.dynamic:
        if scale is not None or rule.element.startswith("uint"):
            raise ValueError(f"no rule for {rule} with a stored scale of {scale}")
        choices = _dynamic_choices(x, rule, global_scale)
        center = choices[0].center(x, rule.element, zero)
        if np.any(off):
            choices = _dynamic_choices(x, rule, global_scale, off)
    else:
        if scale is None or rule.granularity != "tensor" or global_scale != 1:
            raise ValueError(f"no rule for {rule} with a stored scale of {scale} and a global one of {global_scale}")
        stored = np.full_like(x, scale)
        choices = [_Choice(stored, stored, 0.0, _gamma(2))]
        center = choices[0].center(x, rule.element, zero)
    error = np.zeros_like(x)
    for choice in choices:
        for value in choice.ends(x, off, rule.element, zero):
            error = np.maximum(error, np.abs(value - center) + choice.scale_error * np.abs(value))
    return Quantized(center, error, np.maximum.reduce([choice.most for choice in choices]))


@dataclass(frozen=True, slots=True, eq=False)
class _Choice:
    """The least and the largest scale of each element, and by how much of itself it and a quotient by it may be off."""

    least: Floats
    most: Floats
    scale_error: float
    quotient_error: float

    def center(self, x: Floats, element: str, zero: int) -> Floats:
        """What exact arithmetic gives with the least scale."""
        return _nearest(_quotient(x, self.least), element, zero) * self.least

    def ends(self, x: Floats, off: Floats | float, element: str, zero: int) -> Iterator[Floats]:
        """Yield values between which all lie that a right kernel may get; 0 is one where x may be flushed."""
        # Between a scale of 0, by which everything is 0, and one above lie small ones, by which everything is large.
        small, limit = (self.least == 0) & (self.most > 0), 2 * _top(element)
        ends = (x - off, x + off)
        quotients = [np.where(small, np.sign(end) * limit, _quotient(end, self.least)) for end in ends]
        quotients += [_quotient(end, self.most) for end in ends]
        lowest, highest = np.minimum.reduce(quotients), np.maximum.reduce(quotients)
        flushed = np.where(np.abs(x) - off < _SMALLEST_NORMAL, 0.0, highest)
        for quotient in (lowest - self._off(lowest, zero), highest + self._off(highest, zero), flushed):
            code = _nearest(quotient, element, zero)
            yield code * self.least
            yield code * self.most

    def _off(self, quotient: Floats, zero: int) -> Floats:
        size = np.abs(quotient)
        return self.quotient_error * size + (_ROUNDOFF * (size + zero) if zero else 0.0)


def _quotient(x: Floats, scale: Floats) -> Floats:
    """`x / scale`; 0 where the scale is."""
    return np.where(scale == 0, 0.0, x / np.where(scale == 0, 1.0, scale))


def _dynamic_choices(x: Floats, rule: Permission, global_scale: float, off: Floats | float = 0.0) -> list[_Choice]:
    """The scales for x that is known up to `off`; where that is 0, the first is that of exact arithmetic."""
    size, top = np.abs(x), _top(rule.element)
    least, most = (_largest_magnitudes(end, rule) for end in (np.maximum(size - off, 0.0), size + off))
    if rule.scale_dtype == "float32" and global_scale == 1:
        lowest, highest = (np.maximum(amax / top, _SMALLEST_NORMAL) for amax in (least, most))
        return [_Choice(lowest, highest, _gamma(2), _gamma(4))]
    if rule.scale_dtype == "float8_e4m3fn":
        table = floats.values(rule.scale_dtype) * global_scale

        def code(amax: Floats, factor: float) -> Integers:
            return floats.encode(amax / top / global_scale * factor, rule.scale_dtype).astype(np.int64)

        wanted = code(least, 1.0), code(most, 1.0)
        around = code(least, 1 - _gamma(5)), code(most, 1 + _gamma(5))
        pairs = (*_between(*wanted), *_between(*around))
        return [_Choice(table[one], table[other], _gamma(2), _gamma(4)) for one, other in pairs]
    if rule.scale_dtype == "float8_e8m0fnu" and rule.element in _STEPS_AT_THE_TOP and global_scale == 1:
        step = _STEPS_AT_THE_TOP[rule.element]
        lowest = _exponent(least, rule.element, step_at_the_top=bool(step))
        highest = _exponent(most, rule.element, step_at_the_top=step is not False)
        return [_Choice(_power(one), _power(other), 0.0, 0.0) for one, other in _between(lowest, highest)]
    raise ValueError(f"no rule for {rule} with a global scale of {global_scale}")


def _between(lowest: Integers, highest: Integers) -> Iterator[tuple[Integers, Integers]]:
    """Yield up to three pairs of equal numbers that go through all between two; where there are more, these two."""
    apart = highest - lowest
    for step in range(min(2, int(apart.max(initial=0))) + 1):
        here = np.minimum(lowest + step, highest)
        yield np.where(apart > 2, lowest, here), np.where(apart > 2, highest, here)


def _largest_magnitudes(magnitudes: Floats, rule: Permission) -> Floats:
    """The amax of what each element shares a scale with, `[M, K]`."""
    size = max(1, magnitudes.shape[1])
    match rule.granularity:
        case "tensor":
            return np.full_like(magnitudes, magnitudes.max(initial=0.0))
        case "token":
            pass
        case "group":
            size = rule.group_size
        case _:
            raise ValueError(f"no rule for {rule}")
    starts = np.arange(0, magnitudes.shape[1], size)
    largest: Floats = np.maximum.reduceat(magnitudes, starts, axis=1)
    return np.repeat(largest, size, axis=1)[:, : magnitudes.shape[1]]


def _exponent(amax: Floats, element: str, *, step_at_the_top: bool) -> Integers:
    half, exponent = np.frexp(amax)
    above = half >= _STEP_UP / 2 if step_at_the_top else half > _STEP_UP / 2
    wanted = exponent - 1 + above - floats.largest_exponent(element)
    return np.clip(np.where(amax == 0, -127, wanted), -127, 127).astype(np.int64)


def _power(exponent: Integers) -> Floats:
    return np.ldexp(np.ones(exponent.shape), exponent)


def _top(element: str) -> float:
    return floats.largest(element) if element in floats.FORMATS else float(_integers(element)[1])


def _nearest(quotient: Floats, element: str, zero: int) -> Floats:
    """The code nearest to a quotient, less its zero point."""
    if element in floats.FORMATS:
        return floats.decode(floats.encode(quotient, element), element)
    lowest, highest = _integers(element)
    codes: Floats = np.clip(np.rint(quotient) + zero, lowest, highest) - zero
    return codes


def _integers(element: str) -> tuple[int, int]:
    bits = int(element.lstrip("uint"))
    return (0, 2**bits - 1) if element.startswith("u") else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def _gamma(roundings: int) -> float:
    return roundings * _ROUNDOFF / (1 - roundings * _ROUNDOFF)
