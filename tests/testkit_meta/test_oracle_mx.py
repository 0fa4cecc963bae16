"""The oracle of the MX formats and NVFP4 against its own page and ml_dtypes."""

from __future__ import annotations

import doctest

import ml_dtypes
import numpy as np

from quantplug_testkit.oracles import mx


def test_the_worked_examples_hold():
    """What the module's docstring shows is what it does."""
    assert doctest.testmod(mx).failed == 0


def test_every_packed_byte_is_two_codes_of_ml_dtypes():
    """All 256 bytes, both nibbles, and the way back."""
    packed = np.arange(256, dtype=np.uint8)[None, :]
    codes = mx.unpack(packed)
    halves = np.stack([packed & 15, packed >> 4], axis=-1).reshape(1, 512)
    assert np.array_equal(codes, halves)
    assert np.array_equal(mx.pack(codes), packed)
    values = codes.view(ml_dtypes.float4_e2m1fn).astype(np.float64)
    assert np.array_equal(mx.mxfp4(packed, np.full((1, 16), 127, np.uint8)), values)


def test_a_group_ends_where_the_next_begins_and_the_last_may_be_short():
    """40 inputs are 32 and 8 of them in MX, 16, 16 and 8 in NVFP4."""
    ones = np.full((1, 40), 0x38, np.uint8)
    assert mx.mxfp8(ones, np.array([[127, 128]], np.uint8)).tolist() == [[1.0] * 32 + [2.0] * 8]
    packed = np.full((1, 20), 0x22, np.uint8)
    values = mx.nvfp4(packed, np.array([[0x38, 0x40, 0x30]], np.uint8), multiply_by=3.0)
    assert values.tolist() == [[3.0] * 16 + [6.0] * 16 + [1.5] * 8]
