"""What the strategies and makers yield obeys the contract that it claims."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import HealthCheck, find, given, settings
from hypothesis import strategies as st

from quantplug.spec import ElementType, PerGroup, PerTensor, WeightSpec, group_count
from quantplug_testkit import strategies
from quantplug_testkit.canonical import code_range, copy_weight, make_weight, segment_of, transposed_weight
from quantplug_testkit.conformance.problems import CATALOGUE, DTYPES

quick = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


@given(strategies.any_weights())
@quick
def test_weights_obey_their_spec(weight):
    """Dtypes, shapes, ranges and g_idx are those of the spec."""
    spec = weight.spec
    lowest, highest = code_range(spec.element)
    groups = group_count(spec.granularity, weight.in_features)
    rows = 1 if isinstance(spec.granularity, PerTensor) else weight.out_features
    assert weight.codes.dtype == (torch.int8 if spec.element.signed else torch.uint8)
    assert lowest <= int(weight.codes.min())
    assert int(weight.codes.max()) <= highest
    assert weight.scales.shape == (rows, groups)
    assert weight.scales.dtype == getattr(torch, spec.scale_dtype)
    assert weight.scales.isfinite().all()
    assert (weight.zeros is None) == spec.element.signed
    if weight.zeros is not None:
        assert weight.zeros.dtype == torch.uint8
        assert weight.zeros.shape == weight.scales.shape
        assert int(weight.zeros.max()) <= highest
    assert (weight.g_idx is None) != spec.act_order
    if weight.g_idx is not None:
        assert weight.g_idx.dtype == torch.int32
        assert sorted(weight.g_idx.tolist()) == [k // spec.granularity.size for k in range(weight.in_features)]


@given(strategies.any_weights())
@quick
def test_the_oracle_and_the_core_agree_on_values(weight):
    """The oracle's exact values, rounded once, are what the core's canonical form dequantizes to."""
    exact = segment_of(weight).values()
    np.testing.assert_array_equal(exact.astype(np.float32), weight.dequantize().numpy())


@given(strategies.layers(largest=32))
@quick
def test_layers_fit_their_problem(layer):
    """One weight per segment, in its size and format, and a bias when there is one."""
    problem = layer.problem
    assert [weight.spec for weight in layer.weights] == [segment.weight for segment in problem.segments]
    assert all(weight.in_features == problem.in_features for weight in layer.weights)
    assert sum(weight.out_features for weight in layer.weights) == problem.out_features
    assert (layer.bias is not None) == problem.bias


def test_hard_problems_can_be_drawn():
    """Fused layers of different formats, act-order with a short last group, and K below one group are all there."""
    easy = settings(database=None, max_examples=2000, deadline=None)
    find(strategies.problems(), lambda problem: not problem.uniform, settings=easy)
    short = find(strategies.any_weights(48), has_short_act_order_group, settings=easy)
    assert short.in_features % short.spec.granularity.size
    find(strategies.any_weights(48), lambda weight: groups_beyond_k(weight.spec, weight.in_features), settings=easy)


def has_short_act_order_group(weight):
    return weight.g_idx is not None and weight.in_features % weight.spec.granularity.size != 0


def groups_beyond_k(spec, in_features):
    return isinstance(spec.granularity, PerGroup) and spec.granularity.size > in_features


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
            lowest, highest = code_range(weight.spec.element)
            if weight.codes.numel() > 1:
                assert (int(weight.codes.min()), int(weight.codes.max())) == (lowest, highest), hazard.name
