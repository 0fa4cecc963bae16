"""From canonical weights to what the lanes of a warp read, and back, bit by bit, on the CPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from quantplug.kernel import Accepted
from quantplug.platform import Platform
from quantplug.spec import ElementType, LinearProblem, PerBlock, PerChannel, PerGroup, SegmentSpec, WeightSpec
from quantplug_marlin.form import decode, encode
from quantplug_marlin.kernel import MarlinKernel
from quantplug_testkit.canonical import make_weight, transposed_weight, weight_tensors
from quantplug_testkit.compare import assert_bitwise_equal
from quantplug_testkit.conformance.problems import CATALOGUE

KERNEL = MarlinKernel()
GPU = Platform.parse("cuda:9.0")
CPU = torch.device("cpu")
FAMILIES = {
    hazard.family: hazard
    for hazard in CATALOGUE
    if hazard.problem.uniform
    and hazard.problem.activation is None
    and isinstance(KERNEL.supports(hazard.problem, GPU), Accepted)
}
"""The last hazard of each family that is accepted: the one in float16, or bfloat16 where that is refused."""

EVERY_FAMILY = pytest.mark.parametrize("hazard", FAMILIES.values(), ids=lambda hazard: hazard.family)


def prepared(hazard, seed=0, out=None):
    return KERNEL.prepare(hazard.problem, hazard.weights(seed), hazard.activation(), CPU, out=out)


@EVERY_FAMILY
def test_the_way_back_gives_every_bit_again(hazard):
    for found, given in zip(KERNEL.unprepare(prepared(hazard)), hazard.weights(), strict=True):
        ours, theirs = weight_tensors(found), weight_tensors(given)
        assert ours.keys() == theirs.keys()
        for name, tensor in theirs.items():
            assert_bitwise_equal(ours[name], tensor, name)


@EVERY_FAMILY
def test_what_is_held_is_no_more_than_is_declared(hazard):
    entitled = sum(
        tensor.nbytes if name != "codes" else -(-tensor.numel() * weight.spec.element.bits // 8)
        for weight in hazard.weights()
        for name, tensor in weight_tensors(weight).items()
    )
    assert prepared(hazard).nbytes <= entitled + KERNEL.supports(hazard.problem, GPU).extra_bytes


@EVERY_FAMILY
def test_strides_of_canonical_tensors_do_not_matter(hazard):
    views = [transposed_weight(weight) for weight in hazard.weights()]
    again = KERNEL.prepare(hazard.problem, views, hazard.activation(), CPU)
    for name, tensor in prepared(hazard).tensors.items():
        assert_bitwise_equal(again.tensors[name], tensor, name)


def test_every_family_of_the_catalogue_is_tried_or_refused_with_a_reason():
    refused = {h.family for h in CATALOGUE if h.problem.uniform and h.problem.activation is None} - FAMILIES.keys()
    reasons = {KERNEL.supports(h.problem, GPU).code for h in CATALOGUE if h.family in refused}
    assert reasons <= {"element", "granularity"}
    assert len(FAMILIES) > 100


def test_a_second_preparation_writes_into_the_same_memory():
    hazard = FAMILIES["fused-act-order"]
    first = prepared(hazard)
    places = {name: tensor.data_ptr() for name, tensor in first.tensors.items()}
    again = prepared(hazard, seed=1, out=first)
    assert {name: tensor.data_ptr() for name, tensor in again.tensors.items()} == places
    for name, tensor in prepared(hazard, seed=1).tensors.items():
        assert_bitwise_equal(again.tensors[name], tensor, name)


@pytest.mark.parametrize("element", ["int4", "uint4", "uint8", "float8_e4m3fn", "float4_e2m1fn"])
def test_a_lane_finds_its_codes_where_the_layout_says(element):
    """The table of the PTX manual for the first operand of mma.m16n8k16, and the bytes of a lane."""
    spec = WeightSpec(ElementType(element), PerGroup(32))
    problem = LinearProblem(192, (SegmentSpec(48, spec),), "bfloat16")
    weight = make_weight(spec, 48, 192, np.random.default_rng(0))
    units = KERNEL.prepare(problem, [weight], [None], CPU).tensors["codes.0"]
    octets = weight.codes.view(torch.uint8).to(torch.int32)
    stored = {"int4": (octets + 8) & 255, "uint8": octets ^ 128}.get(element, octets)
    for output, k in ((0, 0), (9, 3), (17, 78), (31, 127), (38, 129), (47, 191), (5, 58)):
        tile, chunk, step = output // 16, k // 64, k % 64 // 16
        lane = output % 8 * 4 + k % 8 // 2
        register = (k % 16 >= 8) * 2 + (output % 16 >= 8)  # a0 … a3
        if spec.element.bits == 4:
            place = lane * 16 + step * 4 + (k % 2) * 2 + register // 2
            found = int(units[tile, chunk, place]) >> (register % 2 * 4) & 15
        else:
            place = step // 2 * 512 + lane * 16 + step % 2 * 8 + register // 2 * 4 + (k % 2) * 2 + register % 2
            found = int(units[tile, chunk, place])
        assert found == int(stored[output, k]), (output, k)


def test_blocks_and_one_scale_for_all_are_held_once_for_each_output():
    spec = WeightSpec(ElementType.FLOAT8_E4M3FN, PerBlock(32, 64), "float32")
    weight = make_weight(spec, 40, 128, np.random.default_rng(0))
    problem = LinearProblem(128, (SegmentSpec(40, spec),), "bfloat16")
    scales = KERNEL.prepare(problem, [weight], [None], CPU).tensors["scales.0"]
    assert scales.shape == (3, 2, 8, 2)
    assert float(scales[2, 1, 7, 0]) == float(weight.scales[1, 1])  # output 39
    assert float(scales[0, 1, 3, 1]) == float(weight.scales[0, 1])  # output 11


def test_a_float64_scale_is_rounded_and_has_no_way_back():
    spec = WeightSpec(ElementType.FLOAT8_E4M3FN, PerChannel(), "float32")
    weight = make_weight(spec, 16, 64, np.random.default_rng(0))
    object.__setattr__(weight, "scales", weight.scales.to(torch.float64) / 3)
    held = KERNEL.prepare(LinearProblem(64, (SegmentSpec(16, spec),), "bfloat16"), [weight], [None], CPU)
    with pytest.raises(NotImplementedError, match="float64 scales in float32"):
        KERNEL.unprepare(held)
    assert torch.equal(KERNEL.dequantize(held, torch.float32), weight.dequantize(torch.float32))


@pytest.mark.parametrize("element", ElementType)
def test_the_number_that_names_a_form_gives_it_back(element):
    for parts, per_group in ((0, 1), (1, 2), (2, 3), (4, 12)):
        form = decode(encode(decode(0, half=True, scale="float16")._replace(
            element=element, parts=parts, per_group=per_group)), half=True, scale="float16")  # fmt: skip
        assert (form.element, form.parts, form.per_group) == (element, parts, per_group)
