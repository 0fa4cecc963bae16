"""The rounding oracle against a second implementation, on every code of the narrow types."""

from __future__ import annotations

import doctest
import struct

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantplug_testkit.oracles import rounding
from quantplug_testkit.oracles.rounding import LARGEST, SIGNIFICANT_BITS, SMALLEST_SUBNORMAL, round_to, to_bfloat16


def all_codes(dtype):
    """Every value of a 16-bit type, as float64."""
    with np.errstate(invalid="ignore"):
        return np.arange(2**16, dtype=np.uint16).view(dtype).astype(np.float64)


def hard_inputs(dtype):
    """Every value of the type, every midpoint between neighbours, and the float64 on either side of both."""
    finite = np.sort(all_codes(dtype)[np.isfinite(all_codes(dtype))])
    halfway = (finite[1:] + finite[:-1]) / 2
    points = np.concatenate([finite, halfway])
    return np.concatenate([points, np.nextafter(points, np.inf), np.nextafter(points, -np.inf)])


def test_the_worked_example_holds():
    """What the module's docstring shows is what it does."""
    assert doctest.testmod(rounding).failed == 0


def test_every_bfloat16_rounds_to_itself():
    """All 65536 codes, NaN and the infinities included, keep their value and their sign."""
    values = all_codes(ml_dtypes.bfloat16)
    rounded = to_bfloat16(values)
    np.testing.assert_array_equal(rounded, values)
    np.testing.assert_array_equal(np.signbit(rounded), np.signbit(values))


def test_bfloat16_agrees_with_ml_dtypes():
    """Around every code and every midpoint, the second implementation gives the same number and sign."""
    values = hard_inputs(ml_dtypes.bfloat16)
    # ml_dtypes goes from float64 over float32; only what float32 holds can be compared with it
    values = values[values.astype(np.float32).astype(np.float64) == values]
    expected = values.astype(np.float32).astype(ml_dtypes.bfloat16).astype(np.float64)
    rounded = to_bfloat16(values)
    assert values.size == 2 * 65280 - 1, "all finite codes and all midpoints"
    np.testing.assert_array_equal(rounded, expected)
    np.testing.assert_array_equal(np.signbit(rounded), np.signbit(expected))


def test_bfloat16_rounds_once():
    """A float64 just beside a midpoint goes to its own side; by way of float32 it would be taken for the midpoint."""
    midpoint = 1 + 2.0**-8
    assert to_bfloat16(np.array([midpoint, np.nextafter(midpoint, 2)])).tolist() == [1.0, 1 + 2.0**-7]


def test_bfloat16_takes_the_nearer_neighbour():
    """Beside every midpoint the result is the neighbour on that side, by definition rather than by a second program."""
    finite = np.sort(all_codes(ml_dtypes.bfloat16)[np.isfinite(all_codes(ml_dtypes.bfloat16))])
    finite = finite[np.r_[True, np.diff(finite) > 0]]
    halfway = (finite[1:] + finite[:-1]) / 2
    np.testing.assert_array_equal(to_bfloat16(np.nextafter(halfway, np.inf)), finite[1:])
    np.testing.assert_array_equal(to_bfloat16(np.nextafter(halfway, -np.inf)), finite[:-1])


def test_float16_agrees_with_the_standard_library():
    """Python's own half-precision packing gives the same numbers around every code and midpoint."""
    values = hard_inputs(np.float16)
    values = values[np.abs(values) < 65520]
    expected = np.frombuffer(struct.pack(f"<{values.size}e", *values), np.float16).astype(np.float64)
    np.testing.assert_array_equal(round_to(values, "float16"), expected)


@given(st.floats(allow_nan=False, allow_infinity=False), st.sampled_from(sorted(SIGNIFICANT_BITS)))
def test_one_rounding_stays_within_the_unit_roundoff(value, dtype):
    """The constants that bounds are made of fit the roundings: half a unit in the last place, or half a subnormal."""
    rounded = round_to(np.array(value), dtype)
    if np.isinf(rounded):
        assert abs(value) > LARGEST[dtype]
    else:
        assert abs(rounded - value) <= 2.0 ** -SIGNIFICANT_BITS[dtype] * abs(value) + SMALLEST_SUBNORMAL[dtype] / 2


@pytest.mark.parametrize("dtype", sorted(SIGNIFICANT_BITS))
def test_the_constants_are_those_of_the_dtype(dtype):
    """Largest value, smallest subnormal and precision agree with NumPy's or ml_dtypes' description."""
    info = ml_dtypes.finfo(getattr(ml_dtypes, dtype, dtype))
    assert float(info.max) == LARGEST[dtype]
    assert float(info.smallest_subnormal) == SMALLEST_SUBNORMAL[dtype]
    assert info.nmant + 1 == SIGNIFICANT_BITS[dtype]
