"""The narrow floating-point oracle against ml_dtypes and torch: every code, and around every boundary."""

from __future__ import annotations

import doctest

import ml_dtypes
import numpy as np
import pytest
import torch

from quantplug.codes import FLOAT4_E2M1FN_VALUES
from quantplug_testkit.oracles import floats
from quantplug_testkit.oracles.floats import FORMATS, decode, encode, largest, largest_exponent, values

IN_TORCH = [name for name in FORMATS if name != "float4_e2m1fn"]
SIGNED = [name for name in FORMATS if name != "float8_e8m0fnu"]


def numbers_of(name):
    """All finite values, every midpoint, and the float32 on either side of both within the range of the format."""
    table = values(name)
    finite = np.unique(table[np.isfinite(table)])
    points = np.concatenate([finite, (finite[1:] + finite[:-1]) / 2]).astype(np.float32)
    up, down = np.nextafter(points, np.float32(np.inf)), np.nextafter(points, -np.float32(np.inf))
    numbers = np.clip(np.concatenate([points, up, down]), finite[0], finite[-1]).astype(np.float32)
    # below 2^-126, float32's subnormals, ml_dtypes and torch take every number up to a power of two, near or not
    return numbers[numbers >= 2.0**-126] if name == "float8_e8m0fnu" else numbers


def same(found, expected):
    """Equal numbers, and equal signs of zeros; NaN is NaN."""
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(np.signbit(found) & (found == 0), np.signbit(expected) & (expected == 0))


def test_the_worked_examples_hold():
    """What the module's docstring shows is what it does."""
    assert doctest.testmod(floats).failed == 0


@pytest.mark.parametrize("name", FORMATS)
def test_every_code_is_that_of_ml_dtypes(name):
    """All 256, or 16, codes."""
    codes = np.arange(values(name).size, dtype=np.uint8)
    same(decode(codes, name), codes.view(getattr(ml_dtypes, name)).astype(np.float64))


@pytest.mark.parametrize("name", IN_TORCH)
def test_every_code_is_that_of_torch(name):
    """All 256 codes, as torch casts them."""
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8)
    same(values(name), codes.view(getattr(torch, name)).to(torch.float64).numpy())


def test_every_4_bit_code_is_that_of_the_core():
    """Torch has no cast of float4_e2m1fn; the core's own table is what products use."""
    same(values("float4_e2m1fn"), np.array(FLOAT4_E2M1FN_VALUES))


@pytest.mark.parametrize("name", FORMATS)
def test_the_largest_value_is_that_of_ml_dtypes(name):
    """And so is its exponent."""
    assert largest(name) == float(ml_dtypes.finfo(getattr(ml_dtypes, name)).max)
    assert 1 <= largest(name) / 2.0 ** largest_exponent(name) < 2


@pytest.mark.parametrize("name", FORMATS)
def test_every_finite_value_rounds_to_its_own_code(name):
    """A value that the format holds is not rounded at all."""
    codes = np.arange(values(name).size, dtype=np.uint8)
    finite = codes[np.isfinite(values(name))]
    np.testing.assert_array_equal(encode(values(name)[finite], name), finite)


@pytest.mark.parametrize("name", FORMATS)
def test_rounding_is_that_of_ml_dtypes(name):
    """At every value, at every midpoint, and beside them, within the finite range."""
    numbers = numbers_of(name)
    expected = numbers.astype(getattr(ml_dtypes, name)).astype(np.float64)
    same(decode(encode(numbers.astype(np.float64), name), name), expected)


@pytest.mark.parametrize("name", IN_TORCH)
def test_rounding_is_that_of_torch(name):
    """The same, for what torch casts to."""
    numbers = numbers_of(name)
    expected = torch.from_numpy(numbers).to(getattr(torch, name)).to(torch.float64).numpy()
    same(decode(encode(numbers.astype(np.float64), name), name), expected)


@pytest.mark.parametrize("name", SIGNED)
def test_what_is_beyond_the_largest_value_becomes_it(name):
    """The saturating conversion; torch does the same for float8_e4m3fn."""
    beyond = np.array([largest(name) * 1.01, largest(name) * 4, np.inf])
    assert (decode(encode(beyond, name), name) == largest(name)).all()
    assert (decode(encode(-beyond, name), name) == -largest(name)).all()
    if name == "float8_e4m3fn":
        assert (torch.from_numpy(beyond).float().to(torch.float8_e4m3fn).float() == 448).all()


def test_what_a_format_does_not_have_is_refused():
    """A NaN in 4 bits, and zero or less as a power of two, are errors; elsewhere NaN stays NaN."""
    for name in SIGNED[:-1]:
        assert np.isnan(decode(encode(np.array([np.nan]), name), name)).all()
    with pytest.raises(ValueError, match="float4_e2m1fn has no NaN"):
        encode(np.array([np.nan]), "float4_e2m1fn")
    for number in (0.0, -1.0):
        with pytest.raises(ValueError, match="neither zero nor negative"):
            encode(np.array([number]), "float8_e8m0fnu")
