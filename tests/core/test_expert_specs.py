"""
One contract for all experts, and the halves of joined projections: the same values to the bit, or a refusal.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from quantplug.errors import PlanError
from quantplug.expertrules import PER_EXPERT, Ending, joined, stacked
from quantplug.expertspecs import common_spec, fit_weight, half_spec, halves, row_halves
from quantplug.moescheme import MoEScheme, share
from quantplug.spec import ElementType, PerBlock, PerChannel, PerGroup, PerTensor, WeightSpec, scale_shape
from quantplug.weight import ActivationParams
from quantplug_testkit.canonical import make_weight
from quantplug_testkit.strategies import granularities, seeds, weight_specs, weights

INT4, UINT4, FP8 = ElementType.INT4, ElementType.UINT4, ElementType.FLOAT8_E4M3FN
ORDERS = ("gate_up", "up_gate", "interleaved")


def spec(granularity, element=INT4, **more):
    return WeightSpec(element, granularity, **more)


def check_shapes(weight):
    """What a weight holds is what its contract says it holds."""
    shape = scale_shape(weight.spec.granularity, weight.out_features, weight.in_features)
    if weight.g_idx is None:
        assert tuple(weight.scales.shape) == shape
    assert weight.scales.dtype == getattr(torch, weight.spec.scale_dtype)
    assert (weight.zeros is None) == weight.spec.element.signed
    assert weight.zeros is None or weight.zeros.shape == weight.scales.shape
    assert (weight.global_scale is not None) == weight.spec.global_scale


def same(one, other):
    """To the bit, NaN and the sign of 0 included."""
    return torch.equal(one.view(torch.int32), other.contiguous().view(torch.int32))


@pytest.mark.parametrize(
    ("granularities", "common"),
    [
        ([PerGroup(32), PerGroup(128)], PerGroup(32)),
        ([PerGroup(48), PerGroup(32)], PerGroup(16)),
        ([PerTensor(), PerChannel()], PerChannel()),
        ([PerTensor(), PerGroup(64)], PerGroup(64)),
        ([PerChannel(), PerBlock(128, 64)], PerGroup(64)),
        ([PerBlock(128, 128), PerBlock(64, 96)], PerGroup(32)),
        ([PerGroup(64), PerGroup(64)], PerGroup(64)),
        ([PerBlock(2, 8), PerBlock(2, 8)], PerBlock(2, 8)),
    ],
)
def test_scales_are_repeated_for_the_finest_groups_that_divide_all(granularities, common):
    """In whatever order they come."""
    assert common_spec(spec(each) for each in granularities) == spec(common)
    assert common_spec(spec(each) for each in reversed(granularities)) == spec(common)


def test_dtypes_of_scales_that_differ_become_float32():
    """Which holds all of them."""
    narrow = [spec(PerChannel(), scale_dtype=dtype) for dtype in ("float16", "bfloat16")]
    assert common_spec(narrow) == spec(PerChannel(), scale_dtype="float32")
    assert common_spec(narrow[:1] * 3) == narrow[0]


def test_a_global_scale_of_one_is_a_global_scale_of_all():
    """It is 1 for the others."""
    with_factor, without = (spec(PerGroup(16), FP8, global_scale=flag) for flag in (True, False))
    assert common_spec([without, with_factor]) == with_factor
    weight = make_weight(without, 4, 32, np.random.default_rng(0))
    fitted = fit_weight(weight, with_factor)
    assert fitted.global_scale == 1
    assert same(fitted.dequantize(), weight.dequantize())


def test_what_would_have_to_be_rounded_has_no_common_contract():
    """Other codes; groups whose members are listed, of two sizes."""
    assert common_spec([spec(PerChannel()), spec(PerChannel(), UINT4)]) is None
    assert common_spec([spec(PerGroup(32), act_order=True), spec(PerGroup(64))]) is None
    listed = spec(PerGroup(32), act_order=True)
    assert common_spec([spec(PerGroup(32)), listed]) == listed


@settings(max_examples=30)
@given(data=st.data(), generator=seeds())
def test_a_common_contract_keeps_every_value(data, generator):
    """Any number of contracts over one element type; K need not be a multiple of a group, nor N of a block."""
    n, k = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 96))
    specs = data.draw(st.lists(weight_specs(k), min_size=1, max_size=3))
    specs = [replace(each, element=specs[0].element) for each in specs]
    common = common_spec(specs)
    if common is None:
        assert len({each.granularity for each in specs}) > 1
        assert any(each.act_order for each in specs)
    assume(common is not None)
    for each in specs:
        weight = make_weight(each, n, k, generator)
        fitted = fit_weight(weight, common)
        assert fitted.spec == common
        check_shapes(fitted)
        assert same(fitted.dequantize(), weight.dequantize())


@pytest.mark.parametrize(
    ("stored", "wanted"),
    [
        (spec(PerGroup(32)), spec(PerGroup(64))),
        (spec(PerChannel()), spec(PerTensor())),
        (spec(PerBlock(16, 16)), spec(PerGroup(32))),
        (spec(PerBlock(16, 16)), spec(PerBlock(8, 16))),
        (spec(PerChannel()), spec(PerChannel(), UINT4)),
        (spec(PerChannel(), scale_dtype="float32"), spec(PerChannel(), scale_dtype="float16")),
        (spec(PerChannel(), global_scale=True), spec(PerChannel())),
    ],
)
def test_a_weight_does_not_fit_a_coarser_contract(stored, wanted):
    """Whoever asks for it made a mistake."""
    with pytest.raises(ValueError, match="without rounding"):
        fit_weight(make_weight(stored, 32, 64, np.random.default_rng(0)), wanted)


@settings(max_examples=40)
@given(data=st.data(), order=st.sampled_from(ORDERS))
def test_the_halves_of_a_joined_weight_are_its_rows(data, order):
    """All granularities, zero points, listed groups, blocks that end in the other half or at the ragged edge."""
    rows, k = data.draw(st.integers(1, 24)), data.draw(st.integers(1, 80))
    weight = data.draw(weights(data.draw(weight_specs(k)), 2 * rows, k))
    values = weight.dequantize()
    gate, up = {
        "gate_up": (values[:rows], values[rows:]),
        "up_gate": (values[rows:], values[:rows]),
        "interleaved": (values[0::2], values[1::2]),
    }[order]
    for half, expected in zip(halves(weight, order), (gate, up), strict=True):
        assert half.spec == half_spec(weight.spec, rows, order)
        check_shapes(half)
        assert same(half.dequantize(), expected)


@pytest.mark.parametrize("order", ORDERS)
@given(granularity=granularities(64), n=st.integers(1, 16))
def test_blocks_stay_blocks_where_the_cut_is_between_them(order, granularity, n):
    """And become groups of each row where it is not."""
    whole = half_spec(spec(PerBlock(n, 32)), 48, order)
    assert whole.granularity == (PerBlock(n, 32) if order != "interleaved" and 48 % n == 0 else PerGroup(32))
    if not isinstance(granularity, PerBlock):
        assert half_spec(spec(granularity), 48, order) == spec(granularity)


def test_halves_are_views_where_nothing_is_repeated():
    """A layer's experts would otherwise be in memory twice."""
    weight = make_weight(spec(PerGroup(32)), 8, 64, np.random.default_rng(0))
    for order in ORDERS:
        for half in halves(weight, order):
            assert half.codes.untyped_storage().data_ptr() == weight.codes.untyped_storage().data_ptr()
            assert half.scales.untyped_storage().data_ptr() == weight.scales.untyped_storage().data_ptr()


def test_rows_of_a_bias_are_cut_as_those_of_the_weight():
    """By the same slices."""
    rows = list(range(6))
    assert [rows[cut] for cut in row_halves(6, "gate_up")] == [[0, 1, 2], [3, 4, 5]]
    assert [rows[cut] for cut in row_halves(6, "up_gate")] == [[3, 4, 5], [0, 1, 2]]
    assert [rows[cut] for cut in row_halves(6, "interleaved")] == [[0, 2, 4], [1, 3, 5]]


# -- a layer's scheme --------------------------------------------------------------------------------------------------


def test_experts_of_several_group_sizes_come_to_one_contract_for_each_projection():
    """Gate, up and down by themselves; what the others are does not matter to them."""
    g32, g128, chan = (spec(each) for each in (PerGroup(32), PerGroup(128), PerChannel()))
    scheme = MoEScheme.of(PER_EXPERT, [g32, g128, chan, g128, g128, chan], 64, "layer")
    assert scheme.w13 == (g32, g128)
    assert scheme.w2 == chan


def test_experts_that_cannot_share_a_contract_are_refused_by_name():
    """With what each of them is."""
    four, eight = spec(PerGroup(32)), spec(PerGroup(32), ElementType.INT8)
    with pytest.raises(PlanError, match=r"layer: the up_proj of its experts is stored as int4.* and as int8") as caught:
        MoEScheme.of(PER_EXPERT, [four, four, four, four, eight, four], 64, "layer")
    assert caught.value.code == "QP-PLAN-EXPERTS"


@pytest.mark.parametrize("order", ORDERS)
def test_an_expert_with_a_joined_projection_comes_apart(order):
    """Weight, bias and what is stored about x."""
    generator = np.random.default_rng(1)
    first = make_weight(spec(PerBlock(8, 16), FP8, scale_dtype="float32"), 24, 32, generator)
    second = make_weight(spec(PerGroup(4)), 32, 12, generator)
    scheme = MoEScheme.of(joined(order=order), [first.spec, second.spec], 12, "layer")
    assert scheme.w13[0].granularity == PerGroup(16)  # 12 rows are one block and a half
    stored = ActivationParams(scale=torch.tensor(0.5))
    biases = torch.arange(24.0), torch.arange(32.0)
    expert = scheme.expert([first, second], [stored, None], biases)
    assert [weight.spec for weight in expert.w13] == list(scheme.w13)
    gate, up = row_halves(24, order)
    for weight, bias, cut in zip(expert.w13, expert.b13, (gate, up), strict=True):
        assert same(weight.dequantize(), first.dequantize()[cut])
        assert torch.equal(bias, biases[0][cut])
    assert expert.a13 == (stored, stored)
    assert expert.a2 is None
    assert torch.equal(expert.b2, biases[1])
    assert same(expert.w2.dequantize(), second.dequantize())


def test_an_experts_share_of_a_stacked_tensor_is_turned_and_flattened():
    """As its format has it, contiguous; what has one axis is left as it is."""
    stored = torch.arange(24).reshape(2, 3, 4)
    assert torch.equal(share(stored[0], Ending("", "weight", transposed=True)), stored[0].T)
    assert share(stored[0], Ending("", "weight", transposed=True)).is_contiguous()
    assert torch.equal(share(stored, Ending("_blocks", "weight", flattened=True)), stored.reshape(2, 12))
    assert torch.equal(share(stored[0, 0], Ending("", "bias", transposed=True, flattened=True)), stored[0, 0])


def test_stacked_spellings_name_their_tensors():
    """A projection and an ending each."""
    ending = Ending("_scales", "weight_scale")
    files = stacked(Ending("_blocks", "weight_packed"), ending)
    assert files.stacked_names["down_proj_scales"] == ("down_proj", ending)
    assert set(files.stacked_names) == {
        f"{name}{end}" for name in ("gate_up_proj", "down_proj") for end in ("_blocks", "_scales")
    }
