"""Every floating-point code, through the two steps that the kernels decode it by, against the oracle: exact."""

from __future__ import annotations

import numpy as np
import pytest

from quantplug.spec import ElementType
from quantplug_marlin.form import Form
from quantplug_testkit.oracles import floats

FLOATING = [element for element in ElementType if element.floating]


def number(bits: np.ndarray, half: bool) -> np.ndarray:
    """Return what 16 bits stand for as a float16 or a bfloat16."""
    if half:
        return bits.astype(np.uint16).view(np.float16).astype(np.float64)
    return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


@pytest.mark.parametrize("half", [False, True], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("element", FLOATING)
def test_a_shift_and_a_power_of_two_give_every_value(element: ElementType, half: bool):
    told = Form(element, half, "", 0, 1).definitions()
    codes = np.arange(1 << element.bits)
    upper = codes << (16 - element.bits)  # where decode() in cuda/codes.cuh has them
    bits = (upper & 0x8000) | ((upper & 0x7FFF) >> told["SHIFT"])
    factor = number(np.array([told["FACTOR_BITS"]]), half)[0] if told["FACTOR_BITS"] else 1.0
    wanted = floats.values(element)
    finite = np.isfinite(wanted)
    with np.errstate(invalid="ignore"):  # codes that are NaN
        found = number(bits, half) * factor
    if element is ElementType.FLOAT8_E5M2FNUZ and half:
        assert not np.isfinite(found[finite]).all()  # which is why it is refused
        return
    assert np.array_equal(found[finite], wanted[finite])
    assert np.frexp(factor)[0] == 0.5


@pytest.mark.parametrize("half", [False, True], ids=["bfloat16", "float16"])
def test_lifted_integers_less_lifted_zeros_are_exact(half: bool):
    """A code in the low bits of a power of two is their sum, and so is a zero point: 128 + c - (128 + z)."""
    lift = 0x6400 if half else 0x4300
    codes = np.arange(256 if half else 16)
    lifted = number(lift | codes, half)
    assert np.array_equal(lifted - lifted[0], codes)
    assert lifted[0] == (1024 if half else 128)


def test_a_bfloat16_takes_eight_bits_in_two_parts():
    """The low seven lifted, less the lifted sign bit: two's complement."""
    octets = np.arange(256)
    found = number(0x4300 | (octets & 0x7F), half=False) - number(0x4300 | (octets & 0x80), half=False)
    assert np.array_equal(found, np.where(octets < 128, octets, octets - 256))
