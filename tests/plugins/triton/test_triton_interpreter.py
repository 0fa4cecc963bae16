"""
The Triton kernel on the catalogue of hazards, element by element, through the interpreter.

On a machine with a GPU tests/device does the same, and more, on the GPU.
"""

from __future__ import annotations

import os

import pytest
import torch

from quantplug.kernel import Accepted
from quantplug.platform import Platform
from quantplug_testkit.conformance.case import Case
from quantplug_testkit.conformance.problems import CATALOGUE, Hazard
from quantplug_triton.kernel import TritonKernel

pytest.importorskip("triton", reason="triton is installed on Linux only")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("Triton compiles for the GPU here: see tests/device", allow_module_level=True)

KERNEL = TritonKernel()
GPU = Platform.parse("cuda:9.0")
ACCEPTED = [
    hazard
    for hazard in CATALOGUE
    if hazard.problem.uniform and isinstance(KERNEL.supports(hazard.problem, GPU), Accepted)
]
FAMILIES = {hazard.family: hazard for hazard in ACCEPTED}
"""The last hazard of each family: the one in float32."""


def prepared(hazard: Hazard) -> Case:
    return Case(KERNEL, GPU, torch.device("cpu"), hazard)


@pytest.mark.parametrize("hazard", ACCEPTED, ids=lambda hazard: hazard.name)
def test_every_element_is_within_the_derived_bound(hazard):
    case = prepared(hazard)
    for rows in (0, 1, 3):
        x = case.inputs(rows)
        before = x.clone()
        case.check(x, case.apply(x), f"{rows} rows")
        assert torch.equal(x, before)


@pytest.mark.parametrize("hazard", FAMILIES.values(), ids=lambda hazard: hazard.family)
def test_the_way_back_gives_every_bit_again(hazard):
    case = prepared(hazard)
    for found, given in zip(KERNEL.unprepare(case.prepared), hazard.weights(), strict=True):
        assert torch.equal(found.codes.contiguous().view(torch.uint8), given.codes.contiguous().view(torch.uint8))
        assert found.scales.dtype == given.scales.dtype
        assert torch.equal(found.scales.to(torch.float32), given.scales.to(torch.float32))
        for name in ("zeros", "g_idx", "global_scale"):
            ours, theirs = getattr(found, name), getattr(given, name)
            if theirs is not None:
                assert torch.equal(ours.to(theirs.dtype), theirs), name


def test_every_family_of_the_catalogue_is_tried_or_refused_with_a_reason():
    refused = {h.family for h in CATALOGUE if h.problem.uniform} - FAMILIES.keys()
    reasons = {KERNEL.supports(h.problem, GPU).code for h in CATALOGUE if h.family in refused}
    assert reasons <= {"element"}
    assert len(FAMILIES) > 80


@pytest.mark.parametrize("rows", [17, 65, 130])
def test_more_rows_take_other_tiles(rows):
    case = prepared(FAMILIES["uint4-group32"])
    x = case.inputs(rows)
    case.check(x, case.apply(x), f"{rows} rows")


def test_strided_and_three_dimensional_inputs_are_read_where_they_lie():
    case = prepared(FAMILIES["int8-group32"])
    x = case.inputs(6)
    wide = torch.full((6, 2 * x.shape[1]), torch.nan, dtype=x.dtype)
    wide[:, ::2] = x
    assert torch.equal(case.apply(wide[:, ::2]), case.apply(x))
    assert torch.equal(case.apply(x.view(2, 3, -1)), case.apply(x).view(2, 3, -1))


@pytest.mark.parametrize("hazard", FAMILIES.values(), ids=lambda hazard: hazard.family)
def test_what_is_held_is_no_more_than_is_declared(hazard):
    """The file's own bytes, and those that the verdict declares beside them."""
    held = prepared(hazard)
    entitled = 0
    for weight in hazard.weights():
        others = [weight.scales, weight.zeros, weight.g_idx, weight.global_scale]
        entitled += -(-weight.codes.numel() * weight.spec.element.bits // 8)
        entitled += sum(tensor.nbytes for tensor in others if tensor is not None)
    assert held.prepared.nbytes <= entitled + held.extra_bytes


def test_a_second_preparation_writes_into_the_same_memory():
    hazard = FAMILIES["uint4-group32"]
    case = prepared(hazard)
    places = {name: tensor.data_ptr() for name, tensor in case.prepared.tensors.items()}
    nothing = hazard.activation()
    again = KERNEL.prepare(hazard.problem, hazard.weights(seed=1), nothing, torch.device("cpu"), out=case.prepared)
    assert {name: tensor.data_ptr() for name, tensor in again.tensors.items()} == places
    fresh = KERNEL.prepare(hazard.problem, hazard.weights(seed=1), nothing, torch.device("cpu"))
    assert all(torch.equal(again.tensors[name], tensor) for name, tensor in fresh.tensors.items())
