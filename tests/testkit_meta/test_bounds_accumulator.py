"""The bound for sums in a short accumulator, and in parts: it holds what is done, and little more."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from quantplug.activations import read_activation
from quantplug.kernel import Cast
from quantplug.spec import ElementType, PerChannel, WeightSpec
from quantplug.weight import ActivationParams
from quantplug_testkit.activation import quantized
from quantplug_testkit.bounds import ACCUMULATOR, linear_bound
from quantplug_testkit.canonical import make_weight, segment_of, to_float64
from quantplug_testkit.compare import assert_within
from quantplug_testkit.oracles.activation import Quantized
from quantplug_testkit.oracles.canonical import Segment
from quantplug_testkit.oracles.linear import fused_linear
from quantplug_testkit.quantizing import fake_quantize

SHORT = (Cast("accumulator", ACCUMULATOR),)
LONG = (Cast("long_accumulator", ACCUMULATOR),)
X = read_activation("float8_e4m3fn/token/dynamic", "here")


def exponents(codes):
    """Of 8-bit floats; a subnormal one has the smallest normal one's."""
    return np.where(codes == 0, -1000, np.maximum(np.frexp(codes)[1] - 1, -6))


def step(x, w, total):
    """One instruction: products and the sum so far are aligned, cut off, added up and cut off again."""
    top = np.maximum((exponents(x) + exponents(w)).max(axis=-1), np.where(total == 0, -1000, np.frexp(total)[1] - 1))
    unit = np.ldexp(1.0, np.maximum(top, -900) - 13)
    added = np.trunc(x * w / unit[..., None]).sum(axis=-1) * unit + np.trunc(total / unit) * unit
    unit = np.ldexp(1.0, np.frexp(added)[1] - 1 - 13)
    return np.trunc(added / unit) * unit


def hardware(x, w, width, promoted):
    """Codes `[M, K]` times codes `[N, K]`, `width` products in a step, to float32 after `promoted` of them."""
    left, right = x[:, None, :], w[None, :, :]
    result = np.zeros((len(x), len(w)), np.float32)
    for first in range(0, x.shape[1], promoted):
        total = np.zeros(result.shape)
        for place in range(first, min(first + promoted, x.shape[1]), width):
            total = step(left[..., place : place + width], right[..., place : place + width], total)
        result += total.astype(np.float32)
    return result


def layer(inputs, seed):
    """Return x `[6, K]` of very different rows and a weight `[24, K]`."""
    generator = np.random.default_rng(seed)
    weight = make_weight(WeightSpec(ElementType.FLOAT8_E4M3FN, PerChannel(), "float32"), 24, inputs, generator)
    x = torch.from_numpy(generator.standard_normal((6, inputs)) * 2.0 ** generator.integers(-8, 8, (6, inputs)))
    return x.to(torch.bfloat16), weight


def product(x, weight, width=32, promoted=128):
    """What such hardware makes of a layer whose x is quantized."""
    right = fake_quantize(x.float(), X, ActivationParams())
    scale = (x.float().abs().amax(1, keepdim=True) / 448).clamp(min=2.0**-126)
    codes = (right / scale).to(torch.float8_e4m3fn)
    sums = hardware(codes.double().numpy(), weight.codes.double().numpy(), width, promoted)
    return (torch.from_numpy(sums) * weight.scales[:, 0] * scale).to(x.dtype)


def check(x, weight, y, casts=SHORT):
    operand, segment = quantized(to_float64(x), X, None), segment_of(weight)
    bound = linear_bound([operand], [segment], None, "bfloat16", casts)
    assert_within(y, fused_linear([operand.values], [segment.values()], None), bound)


@pytest.mark.parametrize("width", [16, 32])
@pytest.mark.parametrize("inputs", [1, 31, 128, 700])
def test_what_the_hardware_does_stays_within(inputs, width):
    for seed in range(3):
        x, weight = layer(inputs, seed)
        check(x, weight, product(x, weight, width))


def test_without_the_cast_it_leaves_the_bound():
    x, weight = layer(700, 0)
    with pytest.raises(AssertionError, match="leave the bound"):
        check(x, weight, product(x, weight), ())


@pytest.mark.parametrize("width", [16, 32])
@pytest.mark.parametrize("inputs", [1, 31, 128, 700])
def test_what_it_does_without_ever_promoting_stays_within_the_bound_for_long_sums(width, inputs):
    for seed in range(3):
        x, weight = layer(inputs, seed)
        check(x, weight, product(x, weight, width, promoted=inputs), LONG)


def test_the_bound_for_long_sums_is_that_for_short_ones_up_to_128_products():
    generator = np.random.default_rng(7)
    for inputs, ratio in ((128, 1.0), (256, 2.0), (130, 1.125)):
        segment = Segment.of(generator.integers(1, 8, (4, inputs)).astype(float), [[1.0]] * 4, None, None, -1, 8)
        x = generator.integers(1, 8, (3, inputs)).astype(float)
        none, short, long = (linear_bound(x, [segment], None, "float32", casts) for casts in ((), SHORT, LONG))
        assert long - none == pytest.approx(ratio * (short - none), rel=1e-9)


def test_sums_that_are_never_promoted_leave_it():
    """Fast accumulation: one large product, and many that each are cut off to nothing beside it."""
    codes = np.full((1, 16384), 2.0**-7)
    codes[0, 0] = 1.0
    segment = Segment.of(codes, [[1.0]], None, None, -1, 8)
    x = Quantized.exactly(codes.copy())
    bound = linear_bound([x], [segment], None, "float32", SHORT)
    exact = fused_linear([x.values], [segment.values()], None)
    assert_within(hardware(codes, codes, 32, 128), exact, bound)
    never = hardware(codes, codes, 32, 16384)
    with pytest.raises(AssertionError, match="leave the bound"):
        assert_within(never, exact, bound)
    assert_within(never, exact, linear_bound([x], [segment], None, "float32", LONG))


def test_a_single_product_is_exact():
    """So that the identity shows every weight at its place: nothing is permitted but the result's own rounding."""
    segment = Segment.of([[1.125, 0.0, 2.0**-9]], [[0.5]], None, None, -1, 8)
    x = Quantized.exactly(np.eye(3))
    with_cast, without = (linear_bound([x], [segment], None, "float32", casts) for casts in (SHORT, ()))
    assert with_cast.tolist() == without.tolist()


def test_the_terms_add_up_as_written():
    """Two products, 3 * 0.5 and a subnormal code times 1, which is aligned as if it were 2^-6."""
    segment = Segment.of([[3.0, 2.0**-9]], [[2.0]], None, None, -1, 8)
    x = Quantized(np.array([[0.5, 1.0]]), np.zeros((1, 2)), np.ones((1, 2)))
    with_cast, without = (linear_bound([x], [segment], None, "float32", casts) for casts in (SHORT, ()))
    more = 144 * 2.0**-13 * (0.5 * 6 + 2.0**-6 * 2)
    assert with_cast - without == pytest.approx(more * (1 + 2.0**-24), rel=1e-12)


def test_an_accumulator_has_a_format_of_its_own():
    segment = Segment.of([[1.0]], [[1.0]], None, None, -1, 8)
    for cast in (Cast("accumulator", "float16"), Cast("weights", ACCUMULATOR)):
        with pytest.raises(ValueError, match=f"an accumulator to {ACCUMULATOR}"):
            linear_bound(np.ones((1, 1)), [segment], None, "float32", (cast,))


def test_parts_that_are_added_up_in_a_short_dtype_stay_within():
    """Of 64 inputs each, in another order; with cancellation, where rounding the product once would not do."""
    generator = np.random.default_rng(5)
    weight = make_weight(WeightSpec(ElementType.INT8, PerChannel(), "float32"), 24, 640, generator)
    x = torch.from_numpy(generator.standard_normal((6, 640))).to(torch.bfloat16)
    x[:, 320:] = -x[:, :320]
    weight.codes[:, 320:] = weight.codes[:, :320]
    parts = [a.float() @ w.dequantize().t() for a, w in zip(x.split(64, 1), pieces(weight), strict=True)]
    y = torch.zeros(6, 24, dtype=torch.bfloat16)
    for part in (*parts[1::2], *parts[::2]):
        y += part.to(torch.bfloat16)
    exact = to_float64(x) @ segment_of(weight).values().T
    for what, within in (("splits", True), ("partials", False)):
        bound = linear_bound(to_float64(x), [segment_of(weight)], None, "bfloat16", (Cast(what, "bfloat16"),))
        if within:
            assert_within(y, exact, bound)
        else:
            with pytest.raises(AssertionError, match="leave the bound"):
                assert_within(y, exact, bound)


def pieces(weight):
    """The weight's inputs, 64 at a time."""
    return [replace(weight, codes=codes) for codes in weight.codes.split(64, 1)]


def test_a_single_product_is_rounded_once_however_a_sum_is_split():
    segment = Segment.of(np.ones((1, 640)), [[1.0]], None, None, -1, 8)
    x = np.zeros((1, 640))
    x[0, 300] = 1.0
    bounds = [linear_bound(x, [segment], None, "float32", (Cast(what, "bfloat16"),)) for what in ("splits", "partials")]
    assert bounds[0] == pytest.approx(bounds[1], rel=1e-3)
