"""The rules of quantized x: worked by hand, and kept by every float32 evaluation that they call right."""

from __future__ import annotations

import doctest
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantplug.activations import read_activation
from quantplug.weight import ActivationParams
from quantplug_testkit import strategies
from quantplug_testkit.activation import make_activation, quantized
from quantplug_testkit.canonical import to_float64
from quantplug_testkit.compare import assert_within
from quantplug_testkit.oracles import activation, floats
from quantplug_testkit.oracles.activation import Rule, quantize
from quantplug_testkit.quantizing import dynamic_scale, fake_quantize, largest, nearest

MXFP8 = Rule("float8_e4m3fn", "group", True, 32, "float8_e8m0fnu")
MXFP4 = Rule("float4_e2m1fn", "group", True, 32, "float8_e8m0fnu")
NVFP4 = Rule("float4_e2m1fn", "group", True, 16, "float8_e4m3fn")

PERMISSIONS = strategies.PERMISSIONS[1:]


def row(*numbers):
    return np.array([numbers], np.float64)


def test_the_worked_examples_hold():
    """What the module's docstring shows is what it does."""
    assert doctest.testmod(activation).failed == 0


def test_scales_are_shared_as_the_rule_says():
    """One for all of x, for a row, for consecutive inputs of a row of which the last are fewer."""
    x = np.array([[127.0, 1.0, 254.0], [63.5, 0.0, 0.5]])
    assert quantize(x, Rule("int8", "tensor", True)).values.tolist() == [[128, 0, 254], [64, 0, 0]]
    assert quantize(x, Rule("int8", "token", True)).values.tolist() == [[128, 0, 254], [63.5, 0, 0.5]]
    assert quantize(x, Rule("int8", "group", True, 2)).values.tolist() == [[127, 1, 254], [63.5, 0, 0.5]]


def test_stored_scales_saturate_and_zero_points_shift_the_range():
    """int8 reaches from -128 to 127 scales; with a zero point of 5, uint8 from -5 to 250."""
    ends = row(-1000.0, -64.0, 0.0, 2.0, 1000.0)
    assert quantize(ends, Rule("int8", "tensor", False), scale=0.5).values.tolist() == [[-64, -64, 0, 2, 63.5]]
    shifted = quantize(ends, Rule("uint8", "tensor", False), scale=0.5, zero=5)
    assert shifted.values.tolist() == [[-2.5, -2.5, 0, 2, 125]]
    saturated = quantize(ends, Rule("float8_e4m3fn", "tensor", False), scale=0.5)
    assert saturated.values.tolist() == [[-224, -64, 0, 2, 224]]


def test_zeros_have_a_scale():
    """Rows of zeros stay zeros, and no rows are no rows."""
    for rule in (Rule("int8", "token", True), Rule("int8", "tensor", True), MXFP8, NVFP4):
        assert quantize(np.zeros((2, 3)), rule).values.tolist() == [[0, 0, 0], [0, 0, 0]]
        assert not quantize(np.zeros((2, 3)), rule).error.any()
        assert quantize(np.zeros((0, 3)), rule).values.shape == (0, 3)


def test_scales_are_never_below_the_smallest_normal_number():
    """An x that is smaller gets smaller codes; one that is a subnormal itself may be flushed to zero."""
    found = quantize(row(2.0**-125, 2.0**-127, 3 * 2.0**-128), Rule("int8", "token", True))
    assert found.values.tolist() == [[2.0**-125, 0, 2.0**-126]]
    assert found.error[0, 1] == pytest.approx(2.0**-126)
    assert found.error[0, 2] == 2.0**-126
    assert found.error[0, 0] < 2.0**-145


@pytest.mark.parametrize(
    ("amax", "scales"),
    [(1.0, (2.0**-8,)), (1.74, (2.0**-8,)), (1.75, (2.0**-8, 2.0**-7)), (1.76, (2.0**-7,)), (448.0, (1.0, 2.0))],
)
def test_powers_of_two_for_8_bits(amax, scales):
    """`ceil(log2(amax / 448))`, or one more where amax is 448 times a power of two."""
    choices = activation._dynamic_choices(row(amax), MXFP8, 1.0)
    assert sorted({float(choice.least[0, 0]) for choice in choices}) == list(scales)


@pytest.mark.parametrize(
    ("amax", "scale"), [(4.0, 1.0), (6.0, 1.0), (6.99, 1.0), (7.0, 2.0), (8.0, 2.0), (0.0, 2.0**-127)]
)
def test_powers_of_two_for_4_bits(amax, scale):
    """Up to 7 the largest code stands for amax; from 7 on the next power of two is taken."""
    (choice,) = activation._dynamic_choices(row(amax), MXFP4, 1.0)
    assert choice.least.tolist() == [[scale]]


def test_scales_of_scales_may_be_either_of_two_where_a_boundary_lies_between():
    """`amax / 6 / global` is 1.0625, halfway between 1 and 1.125: both scales are right, and their codes."""
    found = quantize(row(6.375, 2.6), NVFP4, global_scale=1.0)
    assert found.values.tolist() == [[6.0, 3.0]]
    assert found.error[0, 0] == pytest.approx(0.75, abs=1e-5)
    assert quantize(row(6.3, 2.6), NVFP4).error.max() < 1e-5


def test_a_group_far_below_the_global_scale_is_zero():
    """Its scale rounds to 0 in float8_e4m3fn; nothing is divided by that."""
    found = quantize(row(1e-9, -1e-9), NVFP4, global_scale=1.0)
    assert found.values.tolist() == [[0, 0]]
    assert not found.error.any()


@pytest.mark.parametrize(
    ("rule", "stored"),
    [
        (Rule("uint8", "token", True), {}),
        (Rule("int8", "token", True), {"scale": 0.5}),
        (Rule("int8", "token", True), {"global_scale": 0.5}),
        (Rule("int8", "rows", True), {}),
        (Rule("int8", "tensor", False), {}),
        (Rule("int8", "token", False), {"scale": 0.5}),
        (Rule("int8", "group", True, 32, "float8_e8m0fnu"), {}),
    ],
    ids=["uint8 dynamic", "two scales", "global", "granularity", "no scale", "static token", "int8 MX"],
)
def test_what_no_rule_covers_is_refused(rule, stored):
    """An oracle never guesses."""
    with pytest.raises(ValueError, match="no rule for Rule"):
        quantize(row(1.0), rule, **stored)


# ways to evaluate in float32: how the scale is had from amax, and how x is divided by it; torch takes a number over a
# tensor for the number times a reciprocal, which is one rounding more
SCALES = {
    "amax / top": lambda amax, top: amax / top,
    "amax * (1 / top)": lambda amax, top: amax * torch.tensor(1 / top, dtype=torch.float32),
    "1 / (top / amax)": lambda amax, top: 1 / (torch.tensor(top) / amax),
}
QUOTIENTS = {
    "x / scale": lambda x, scale: x / scale,
    "x * (1 / scale)": lambda x, scale: x * (1 / scale),
}


def beside_boundaries(element, amax, generator):
    """A row with that largest magnitude, all others within a few roundings of the middle between two codes."""
    codes = np.arange(127.0) if element == "int8" else floats.values("float8_e4m3fn")[:127]
    middles = (codes[1:] + codes[:-1]) / 2 * (amax / codes[-1])
    signed = (
        middles * generator.choice([-1.0, 1.0], middles.size) * (1 + generator.uniform(-4, 4, middles.size) / 2**24)
    )
    return torch.from_numpy(np.append(signed, amax)).float()[None]


@given(strategies.seeds(), st.sampled_from(["int8", "float8_e4m3fn"]))
@settings(max_examples=200, deadline=None)
def test_every_right_evaluation_is_permitted(generator, element):
    """Whatever order of roundings a kernel chooses, each of its numbers lies within what the oracle permits."""
    spec = read_activation(f"{element}/token/dynamic", "here")
    x = beside_boundaries(element, float(np.float32(generator.uniform(0.1, 10))), generator)
    oracle = quantized(to_float64(x), spec, None)
    top = 127.0 if element == "int8" else 448.0
    for scale_of, quotient_of in product(SCALES.values(), QUOTIENTS.values()):
        scale = scale_of(largest(x, spec), top)
        codes = nearest(quotient_of(x, scale), spec.element, None)
        assert_within(codes.double() * scale.double(), oracle.values, oracle.error, "x")


@given(strategies.seeds())
@settings(max_examples=200, deadline=None)
def test_a_zero_point_may_be_added_before_rounding(generator):
    """Which takes what lies beside a boundary to another side, and a tie to another even code."""
    spec = read_activation("uint8/tensor/static", "here")
    params = make_activation(spec, generator)
    middles = generator.integers(-60, 60, (1, 64)) + 0.5
    beside = generator.uniform(-1, 1, (1, 64)) * (np.abs(middles) + int(params.zero)) / 2**24
    x = torch.from_numpy((middles + beside) * float(params.scale)).float()
    oracle = quantized(to_float64(x), spec, params)
    for quotient_of in QUOTIENTS.values():
        codes = (quotient_of(x, params.scale) + params.zero).round().clamp(0, 255) - params.zero
        assert_within(codes.double() * params.scale.double(), oracle.values, oracle.error, "x")


@given(st.data(), st.sampled_from(PERMISSIONS), st.sampled_from(strategies.DTYPES))
@settings(max_examples=300, deadline=None)
def test_the_torch_reading_of_every_rule_is_permitted(data, text, dtype):
    """The quantizing kernel and the oracle share no code, and agree on all that a file can permit."""
    spec = read_activation(text, "here")
    x = data.draw(strategies.inputs((3, 21), dtype)).float()
    params = make_activation(spec, data.draw(strategies.seeds()))
    oracle = quantized(to_float64(x), spec, params)
    # a code times its scale is one rounding more, which the bound of a product counts
    product_error = 2.0**-24 * (np.abs(oracle.values) + oracle.error) + 2.0**-150
    found = fake_quantize(x, spec, params or ActivationParams())
    assert_within(found, oracle.values, oracle.error + product_error, "x")


@pytest.mark.parametrize("text", PERMISSIONS)
def test_little_is_permitted_beside_the_nearest_code(text):
    """Of many x, one in a thousand may become another code; all others are off by the rounding of a scale at most."""
    spec = read_activation(text, "here")
    generator = np.random.default_rng(11)
    x = generator.standard_normal((64, 256)).astype(np.float32).astype(np.float64)
    oracle = quantized(x, spec, make_activation(spec, generator))
    assert (oracle.error > 2.0**-20 * np.abs(oracle.values)).mean() < 1e-3


def test_a_scale_is_not_finite_where_its_largest_magnitude_is_not():
    """In every dtype of scales, so that what comes of it shows."""
    for text in PERMISSIONS:
        spec = read_activation(text, "here")
        if spec.dynamic:
            assert dynamic_scale(torch.tensor([torch.nan, torch.inf]), spec, torch.tensor(1.0)).isnan().all()
