"""Every floating-point code, through the two steps that the kernels decode it by, against the oracle: exact."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from quantplug.errors import LoadError
from quantplug.spec import ElementType, LinearProblem, PerGroup, SegmentSpec, WeightSpec
from quantplug.weight import Weight
from quantplug_marlin.form import Form, common, decode, encode, exact_exponents
from quantplug_marlin.prepare import prepare
from quantplug_testkit.oracles import floats
from quantplug_testkit.oracles.rounding import round_to

FLOATING = [element for element in ElementType if element.floating]
DTYPES = ("bfloat16", "float16")


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


@pytest.mark.parametrize("half", [False, True], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("element", FLOATING)
def test_codes_times_scales_of_permitted_exponents_are_exact(element: ElementType, half: bool):
    """What consume.cuh makes of every code; soon beyond the largest exponent it would not be."""
    told = Form(element, half, "bfloat16", 2, 1, exact=True).definitions()
    codes = floats.values(element)
    codes = codes[np.isfinite(codes)]
    lowest, highest = exact_exponents(element, half=half)

    def is_exact(exponent: int) -> bool:
        scale, operands = np.float64([2.0 ** (exponent + told["FOLD"])]), codes * 2.0 ** (exponent - told["UNFOLD"])
        with np.errstate(over="ignore"):
            return all(np.array_equal(round_to(given, DTYPES[half]), given) for given in (scale, operands))

    assert lowest < highest
    assert all(is_exact(exponent) for exponent in range(lowest, highest + 1))
    assert not is_exact(highest + 2)


@pytest.mark.parametrize("half", [False, True], ids=["bfloat16", "float16"])
def test_fp4_times_scales_in_fp8_is_exact(half: bool):
    told = Form(ElementType.FLOAT4_E2M1FN, half, "float16", 4, 1, exact=True).definitions()
    scales = floats.values(ElementType.FLOAT8_E4M3FN)
    scales = scales[np.isfinite(scales)]
    operands = np.outer(floats.values(ElementType.FLOAT4_E2M1FN), scales) * 2.0 ** -told["UNFOLD"]
    for given in (scales * 2.0 ** told["FOLD"], operands):
        assert np.array_equal(round_to(given, DTYPES[half]), given)


def test_a_number_says_whether_scales_multiply_codes():
    plain = Form(ElementType.FLOAT8_E4M3FN, half=False, scale="bfloat16", parts=2, per_group=1)
    exact = plain._replace(exact=True)
    for form in (plain, exact):
        assert decode(encode(form), half=False, scale="bfloat16") == form
    assert common(encode(exact), encode(exact)) == encode(exact)
    assert common(encode(exact), encode(plain)) == common(encode(plain), encode(exact)) == encode(plain)


def test_scales_that_break_an_exact_layout_cannot_take_its_place():
    spec = WeightSpec(ElementType.FLOAT8_E4M3FN, PerGroup(32), "float8_e8m0fnu")
    problem = LinearProblem(64, (SegmentSpec(16, spec),), "bfloat16")
    weights = [
        Weight(
            torch.zeros(16, 64, dtype=torch.float8_e4m3fn),
            torch.full((16, 2), 2.0**exponent).to(torch.float8_e8m0fnu),
            spec,
        )
        for exponent in (-7, 40)
    ]
    held, other = (prepare(problem, [weight], torch.device("cpu"), "marlin.tiles", None) for weight in weights)
    assert prepare(problem, weights[:1], torch.device("cpu"), "marlin.tiles", other) is other
    with pytest.raises(LoadError, match="QP-LOAD-PREPARE"):
        prepare(problem, weights[1:], torch.device("cpu"), "marlin.tiles", held)
