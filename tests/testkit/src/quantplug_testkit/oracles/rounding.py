"""
Rounding to nearest, ties to even, from float64 to the dtypes that weights and activations are stored in.

bfloat16 keeps 8 significant bits and the exponents of float32. It is rounded here on integers: a float64 is an integer
of 53 bits times a power of two, and rounding is dropping its low bits.

A worked example: 1 + 1/256 lies halfway between 1 and 1 + 1/128, and goes to the even one.

>>> to_bfloat16(np.array([1 + 1 / 256, 1 + 3 / 256, 3.39e38, 3.4e38, -6e-41])).tolist()
[1.0, 1.015625, 3.3895313892515355e+38, inf, -9.183549615799121e-41]
"""

from __future__ import annotations

import numpy as np

from quantplug_testkit.oracles.canonical import Floats

SIGNIFICANT_BITS = {"bfloat16": 8, "float16": 11, "float32": 24}
"""Bits of the significand, the implicit one included."""

SMALLEST_SUBNORMAL = {"bfloat16": 2.0**-133, "float16": 2.0**-24, "float32": 2.0**-149}
"""Distance between neighbours below the smallest normal number."""

LARGEST = {"bfloat16": (2 - 2.0**-7) * 2.0**127, "float16": 65504.0, "float32": (2 - 2.0**-23) * 2.0**127}
"""Largest finite value."""


def to_bfloat16(values: Floats) -> Floats:
    """Round float64 of any shape to bfloat16; the result is float64, too, so that nothing else rounds it."""
    finite = np.isfinite(values)
    # |value| = fraction * 2^exponent with 0.5 <= fraction < 1, so fraction * 2^53 is an integer
    fraction, exponent = np.frexp(np.where(finite, np.abs(values), 0.0))
    integer = np.ldexp(fraction, 53).astype(np.uint64)
    # the last bit kept: 8 bits down from the first one, but never below the smallest subnormal
    last = np.maximum(exponent - 8, -133)
    # at least 45 bits go; 55 are all there are and the half of what comes above them
    drop = np.minimum(last - (exponent - 53), 55).astype(np.uint64)
    one = np.uint64(1)
    odd = (integer >> drop) & one
    kept = (integer + (one << (drop - one)) - one + odd) >> drop
    with np.errstate(over="ignore"):
        rounded = np.ldexp(kept.astype(np.float64), last)
    rounded = np.where(rounded > LARGEST["bfloat16"], np.inf, rounded)
    return np.where(finite, np.copysign(rounded, values), values)


def to_float16(values: Floats) -> Floats:
    """Round float64 to float16, as float64; NumPy rounds this in one step."""
    with np.errstate(over="ignore"):
        return values.astype(np.float16).astype(np.float64)


def to_float32(values: Floats) -> Floats:
    """Round float64 to float32, as float64; the processor rounds this in one step."""
    with np.errstate(over="ignore"):
        return values.astype(np.float32).astype(np.float64)


_ROUNDINGS = {"bfloat16": to_bfloat16, "float16": to_float16, "float32": to_float32}


def round_to(values: Floats, dtype: str) -> Floats:
    """Round float64 to the dtype of that torch name."""
    return _ROUNDINGS[dtype](values)
