"""The derived bound: kernels that keep to what they declare stay inside, and it leaves them no room beside that."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from quantplug.codes import code_values
from quantplug.kernel import Cast
from quantplug.spec import ElementType, PerBlock, PerGroup, WeightSpec
from quantplug_testkit import strategies
from quantplug_testkit.bounds import gamma, linear_bound, unit_roundoff, weight_error
from quantplug_testkit.canonical import make_weight, segment_of, to_float64
from quantplug_testkit.compare import assert_within
from quantplug_testkit.oracles.linear import linear
from quantplug_testkit.oracles.rounding import LARGEST

CASTS = ("scales", "zeros", "weights", "partials")


def rounded(tensor, casts, what):
    """Round to what a cast says, if there is one."""
    return next((tensor.to(getattr(torch, cast.dtype)).float() for cast in casts if cast.what == what), tensor)


def honest_product(x, weight, bias, casts, *, before=True):
    """A float32 kernel that performs exactly the casts it is told to, scales before or after their global scale."""
    scale = spread(weight.scales.float(), weight)
    factor = 1 if weight.global_scale is None else weight.global_scale
    held = rounded(scale, casts, "scales") * factor if before else rounded(scale * factor, casts, "scales")
    codes = code_values(weight.codes, weight.spec.element)
    if weight.zeros is None:
        values = codes * held
    elif any(cast.what == "zeros" for cast in casts):
        middle = 1 << (weight.spec.element.bits - 1)
        offset = rounded((middle - spread(weight.zeros.float(), weight)) * (scale * factor), casts, "zeros")
        values = (codes - middle) * held + offset
    else:
        values = (codes - spread(weight.zeros.float(), weight)) * held
    y = rounded(x.float() @ rounded(values, casts, "weights").t(), casts, "partials")
    return (y if bias is None else y + bias.float()).to(x.dtype)


def spread(shared, weight):
    """Scales or zero points for each element, or for all elements of a column."""
    if isinstance(weight.spec.granularity, PerBlock):
        shared = shared.repeat_interleave(weight.spec.granularity.n, 0)[: weight.out_features]
    return shared[:, weight.group_index()]


def held_against(x, weight, bias, casts, y):
    segment = segment_of(weight)
    b = None if bias is None else to_float64(bias)
    bound = linear_bound(to_float64(x), [segment], b, str(x.dtype).removeprefix("torch."), casts)
    assert_within(y, linear(to_float64(x), segment.values(), b), bound)


@st.composite
def declared(draw):
    """Any set of casts."""
    return tuple(
        Cast(what, draw(st.sampled_from(("bfloat16", "float16", "float32"))))
        for what in draw(st.sets(st.sampled_from(CASTS)))
    )


@given(st.data(), strategies.any_weights(48), st.sampled_from(strategies.DTYPES), st.booleans(), declared())
@settings(max_examples=300, deadline=None)
def test_a_kernel_that_keeps_its_word_stays_within(data, weight, dtype, with_bias, casts):
    """Any format, any casts, any values that the dtypes of the casts can hold: what is declared is enough."""
    assume(all(np.abs(segment_of(weight).values()).max() < LARGEST[cast.dtype] for cast in casts))
    x = data.draw(strategies.inputs((3, weight.in_features), dtype))
    bias = data.draw(strategies.inputs((weight.out_features,), dtype)) if with_bias else None
    y = honest_product(x, weight, bias, casts, before=data.draw(st.booleans()))
    held_against(x, weight, bias, casts, y)


def sample(bits=4, scale_dtype="float16"):
    spec = WeightSpec(ElementType.integer(bits, signed=False), PerGroup(32), scale_dtype)
    return make_weight(spec, 64, 256, np.random.default_rng(3), scales="spread")


@pytest.mark.parametrize("what", CASTS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_cast_that_is_not_declared_leaves_the_bound(what, dtype):
    """Without the declaration each cast shows, in float32, where the result's own rounding hides nothing."""
    weight = sample(scale_dtype="float32")
    generator = torch.Generator().manual_seed(5)
    x, bias = torch.randn(8, 256, generator=generator), torch.randn(64, generator=generator)
    casts = (Cast(what, dtype),)
    y = honest_product(x, weight, bias, casts)
    held_against(x, weight, bias, casts, y)
    with pytest.raises(AssertionError, match="leave the bound"):
        held_against(x, weight, bias, (), y)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_bound_leaves_no_room_beside_the_rounding_of_the_result(dtype):
    """The worst of many results over 32 inputs uses more than 0.9 of its bound: there is nothing to hide in."""
    spec = WeightSpec(ElementType.UINT4, PerGroup(32))
    weight = make_weight(spec, 64, 32, np.random.default_rng(3), scales="spread")
    segment = segment_of(weight)
    x = torch.randn(64, 32, generator=torch.Generator().manual_seed(7)).to(getattr(torch, dtype))
    y = honest_product(x, weight, None, ())
    error = np.abs(to_float64(y) - linear(to_float64(x), segment.values()))
    assert 0.9 < (error / linear_bound(to_float64(x), [segment], None, dtype)).max() <= 1


def test_a_cast_of_scales_that_changes_none_costs_nothing():
    """Scales that are stored in bfloat16 are not rounded by a cast to bfloat16."""
    segment = segment_of(sample(scale_dtype="bfloat16"))
    assert not weight_error(segment, (Cast("scales", "bfloat16"),)).any()
    assert not weight_error(segment, (Cast("scales", "float32"),)).any()
    assert weight_error(segment, (Cast("scales", "float16"),)).sum() == 0
    assert weight_error(segment_of(sample()), (Cast("scales", "bfloat16"),)).any()


@pytest.mark.parametrize("before", [True, False])
def test_scales_may_be_cast_before_or_after_their_global_scale(before):
    """Each weight on its own, so that no sum hides which of both is permitted."""
    spec = WeightSpec(ElementType.UINT4, PerGroup(32), "float32", global_scale=True)
    weight = make_weight(spec, 64, 64, np.random.default_rng(3), scales="spread")
    casts = (Cast("scales", "bfloat16"),)
    held_against(torch.eye(64), weight, None, casts, honest_product(torch.eye(64), weight, None, casts, before=before))


def test_a_cast_of_zeros_costs_nothing_where_the_zero_point_is_in_the_middle():
    """`(mid - zero) * scale` is exactly 0 there, and signed codes have no zero point at all."""
    cast = (Cast("zeros", "bfloat16"),)
    spec = WeightSpec(ElementType.UINT4, PerGroup(32))
    middle = make_weight(spec, 8, 64, np.random.default_rng(0), zeros="middle")
    assert not weight_error(segment_of(middle), cast).any()
    signed = make_weight(WeightSpec(ElementType.INT4, PerGroup(32)), 8, 64, np.random.default_rng(0))
    assert not weight_error(segment_of(signed), cast).any()
    assert weight_error(segment_of(sample()), cast).any()


def test_the_terms_add_up_as_written():
    """A worked example: one weight of 3 * 0.5, x = 2, b = 1, a bfloat16 result."""
    weight = make_weight(WeightSpec(ElementType.UINT4, PerGroup(32)), 1, 1, np.random.default_rng(0))
    weight.codes[:], weight.zeros[:], weight.scales[:] = 11, 8, 0.5
    bound = linear_bound(np.array([[2.0]]), [segment_of(weight)], np.array([1.0]), "bfloat16")
    accumulated = (gamma(4, 2.0**-24) + gamma(4, 2.0**-53)) * (2 * 1.5 + 1) + 2.0**-126 * (2 + 4)
    expected = accumulated + 2.0**-8 * (4 + accumulated) + 2.0**-134
    assert bound.tolist() == [[expected]]
    assert unit_roundoff("bfloat16") == 2.0**-8


def test_a_global_scale_is_two_roundings():
    """The same with a global scale of 2: of a scale of 0.25 it makes the same value."""
    spec = WeightSpec(ElementType.UINT4, PerGroup(32), global_scale=True)
    weight = make_weight(spec, 1, 1, np.random.default_rng(0))
    weight.codes[:], weight.zeros[:], weight.scales[:], weight.global_scale[...] = 11, 8, 0.25, 2.0
    bound = linear_bound(np.array([[2.0]]), [segment_of(weight)], np.array([1.0]), "float32")
    accumulated = (gamma(6, 2.0**-24) + gamma(6, 2.0**-53)) * (2 * 1.5 + 1) + 2.0**-126 * (2 + 6)
    assert bound.tolist() == [[accumulated + 2.0**-24 * (4 + accumulated) + 2.0**-150]]


def test_a_result_that_may_overflow_may_be_infinite():
    """Beside the largest finite value the bound is infinite; far from it, it is not."""
    weight = make_weight(WeightSpec(ElementType.UINT4, PerGroup(32)), 1, 1, np.random.default_rng(0))
    weight.codes[:], weight.zeros[:], weight.scales[:] = 9, 8, 1.0
    segment = segment_of(weight)
    bound = linear_bound(np.array([[65504.0], [1000.0]]), [segment], None, "float16")
    assert np.isinf(bound[0, 0])
    assert bound[1, 0] < 1
    assert_within(np.array([[np.inf], [1000.0]]), np.array([[65504.0], [1000.0]]), bound)
    with pytest.raises(AssertionError, match="1 of 2 elements"):
        assert_within(np.array([[np.nan], [1000.0]]), np.array([[65504.0], [1000.0]]), bound)


@pytest.mark.parametrize(
    "casts",
    [(Cast("inputs", "bfloat16"),), (Cast("scales", "int8"),), (Cast("zeros", "float16"), Cast("zeros", "bfloat16"))],
    ids=["unknown operand", "no float dtype", "twice"],
)
def test_what_no_bound_can_be_derived_from_is_refused(casts):
    """A cast that the derivation does not know is an error, never a guess."""
    with pytest.raises(ValueError, match="cannot derive a bound from Cast"):
        weight_error(segment_of(sample()), casts)
