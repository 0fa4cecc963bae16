"""What the strategies and makers yield obeys the contract that it claims."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import HealthCheck, Phase, find, given, settings
from hypothesis import strategies as st

from quantplug.spec import ElementType, PerBlock, PerGroup, WeightSpec, scale_shape
from quantplug_testkit import strategies
from quantplug_testkit.canonical import (
    code_numbers,
    code_range,
    copy_weight,
    make_weight,
    segment_of,
    to_float64,
    transposed_weight,
)
from quantplug_testkit.compare import assert_within
from quantplug_testkit.conformance.problems import CATALOGUE, DTYPES
from quantplug_testkit.oracles.floats import largest

quick = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


@given(strategies.any_weights())
@quick
def test_weights_obey_their_spec(weight):
    """Dtypes, shapes, ranges and g_idx are those of the spec."""
    spec = weight.spec
    shape = scale_shape(spec.granularity, weight.out_features, weight.in_features)
    assert weight.codes.dtype == code_dtype(spec.element)
    assert np.isfinite(code_numbers(weight)).all()
    if weight.codes.numel() > 1:
        assert code_ends(weight) == ends(spec.element)
    assert weight.scales.shape == shape
    assert weight.scales.dtype == getattr(torch, spec.scale_dtype)
    assert np.isfinite(to_float64(weight.scales)).all()
    assert (weight.zeros is None) == spec.element.signed
    if weight.zeros is not None:
        assert weight.zeros.dtype == torch.uint8
        assert weight.zeros.shape == shape
        assert int(weight.zeros.max()) <= code_range(spec.element)[1]
    assert (weight.g_idx is None) != spec.act_order
    if weight.g_idx is not None:
        assert weight.g_idx.dtype == torch.int32
        assert sorted(weight.g_idx.tolist()) == [k // spec.granularity.size for k in range(weight.in_features)]
    assert (weight.global_scale is None) != spec.global_scale
    if weight.global_scale is not None:
        assert (weight.global_scale.dtype, weight.global_scale.shape) == (torch.float32, ())


def code_dtype(element):
    if not element.floating:
        return torch.int8 if element.signed else torch.uint8
    return torch.uint8 if element is ElementType.FLOAT4_E2M1FN else getattr(torch, element)


def code_ends(weight):
    numbers = code_numbers(weight)
    return numbers.min(), numbers.max()


def ends(element):
    return (-largest(element), largest(element)) if element.floating else code_range(element)


@given(strategies.any_weights())
@quick
def test_the_oracle_and_the_core_agree_on_values(weight):
    """The oracle's values, rounded where the core's canonical form says so, are what it dequantizes to."""
    segment = segment_of(weight)
    scale = segment.scale().astype(np.float32)
    exact = (segment.codes - segment.zero()) * scale
    np.testing.assert_array_equal(exact.astype(np.float32), weight.dequantize().numpy())
    # a scale is off by half a unit in the last place, or by half a subnormal
    off = 2.0**-24 * np.abs(segment.values()) + 2.0**-150 * np.abs(segment.codes - segment.zero())
    assert_within(exact, segment.values(), np.where(segment.global_scale == 1, 0.0, off))


@given(strategies.layers(largest=32))
@quick
def test_layers_fit_their_problem(layer):
    """One weight per segment, in its size and format, a bias when there is one, and what the file stores about x."""
    problem = layer.problem
    assert [weight.spec for weight in layer.weights] == [segment.weight for segment in problem.segments]
    assert all(weight.in_features == problem.in_features for weight in layer.weights)
    assert sum(weight.out_features for weight in layer.weights) == problem.out_features
    assert (layer.bias is not None) == problem.bias
    permission = problem.activation
    for params in layer.activation:
        assert (params is None) == (permission is None or (permission.dynamic and not permission.global_scale))
        if params is not None:
            assert (params.scale is None) == permission.dynamic
            assert (params.zero is None) == (permission.element is not ElementType.UINT8)
            assert (params.global_scale is None) != permission.global_scale


def test_hard_problems_can_be_drawn():
    """Fused layers of different formats, short last groups, ragged blocks, K below one group: all are there."""
    assert_drawn(strategies.problems(), lambda problem: not problem.uniform)
    specs = strategies.weight_specs(37)
    assert_drawn(specs, lambda spec: spec.act_order and 37 % spec.granularity.size)
    assert_drawn(specs, lambda spec: isinstance(spec.granularity, PerGroup) and spec.granularity.size > 37)
    assert_drawn(specs, lambda spec: isinstance(spec.granularity, PerBlock) and 37 % spec.granularity.k)
    assert_drawn(specs, lambda spec: spec.element.floating and spec.scale_dtype == "float8_e8m0fnu")
    assert_drawn(specs, lambda spec: spec.element is ElementType.FLOAT4_E2M1FN and spec.global_scale)


def assert_drawn(strategy, condition):
    """Hypothesis raises when it draws none; the smallest is of no interest."""
    once = settings(database=None, max_examples=2000, deadline=None, phases=[Phase.generate])
    find(strategy, condition, settings=once)


@given(st.sampled_from(DTYPES), st.data())
@quick
def test_inputs_are_finite_unless_asked(dtype, data):
    """NaN and the infinities come only where a test wants them."""
    x = data.draw(strategies.inputs((4, 8), dtype))
    assert x.dtype == getattr(torch, dtype)
    assert x.isfinite().all()


def test_inputs_that_are_not_finite_can_be_drawn():
    """They come when they are asked for."""
    unlimited = settings(database=None, deadline=None)
    find(strategies.inputs((2, 3), "bfloat16", finite=False), lambda x: not x.isfinite().all(), settings=unlimited)


def test_copies_and_views_hold_the_same_weight():
    """A copy has its own memory; a transposed view the same numbers in another order."""
    weight = make_weight(WeightSpec(ElementType.UINT4, PerGroup(8), act_order=True), 6, 20, np.random.default_rng(1))
    for other in (copy_weight(weight), transposed_weight(weight)):
        assert other.codes.data_ptr() != weight.codes.data_ptr()
        assert torch.equal(other.codes, weight.codes)
        assert torch.equal(other.dequantize(), weight.dequantize())
    assert not transposed_weight(weight).codes.is_contiguous()


def test_the_catalogue_is_the_same_on_every_call():
    """Names are unique, and a hazard's weights depend on nothing but its name and the seed."""
    assert len({hazard.name for hazard in CATALOGUE}) == len(CATALOGUE)
    hazard = next(hazard for hazard in CATALOGUE if hazard.family == "fused-different-formats")
    for one, other in zip(hazard.weights(), hazard.weights(), strict=True):
        assert torch.equal(one.codes, other.codes)
        assert torch.equal(one.scales, other.scales)
    assert not torch.equal(hazard.weights()[0].codes, hazard.weights(seed=1)[0].codes)


def test_the_catalogue_shows_both_ends_of_every_code_range():
    """A hazard without the extreme codes would let a sign or a mask slip."""
    for hazard in CATALOGUE:
        for weight in hazard.weights():
            if weight.codes.numel() > 1:
                assert code_ends(weight) == ends(weight.spec.element), hazard.name
