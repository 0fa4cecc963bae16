"""What the CUDA C++ kernel takes and refuses: the same answer on any machine, without a GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest

from quantplug.kernel import Accepted, Rejected
from quantplug.platform import Platform
from quantplug.spec import ElementType, LinearProblem, PerGroup, SegmentSpec, WeightSpec
from quantplug_marlin.kernel import MarlinKernel
from quantplug_marlin.slots import arrange_in_order

KERNEL = MarlinKernel()
WEIGHT = WeightSpec(ElementType.UINT4, PerGroup(64))
PROBLEM = LinearProblem(576, (SegmentSpec(1536, WEIGHT),), "bfloat16")


def with_weight(**changes) -> LinearProblem:
    return replace(PROBLEM, segments=(SegmentSpec(64, replace(WEIGHT, **changes)),))


@pytest.mark.parametrize("platform", ["cuda", "cuda:8.0", "cuda:8.9", "cuda:9.0"])
def test_gpus_from_8_0_on_are_accepted(platform):
    verdict = KERNEL.supports(PROBLEM, Platform.parse(platform))
    assert isinstance(verdict, Accepted)
    assert verdict.casts == ()
    assert verdict.extra_bytes == 0


@pytest.mark.parametrize("element", ElementType)
def test_every_element_type_is_accepted_for_bfloat16(element):
    assert isinstance(KERNEL.supports(with_weight(element=element), Platform.parse("cuda:9.0")), Accepted)


@pytest.mark.parametrize(("version", "notes"), [("9.0", ()), ("8.0", None), ("12.0", None)])
def test_a_gpu_that_nobody_ran_it_on_is_accepted_with_that_remark(version, notes):
    verdict = KERNEL.supports(PROBLEM, Platform.parse(f"cuda:{version}"))
    assert isinstance(verdict, Accepted)
    assert verdict.notes == (notes if notes is not None else (f"compute capability {version}: not run on hardware",))


@pytest.mark.parametrize(
    ("problem", "platform", "code", "words"),
    [
        (PROBLEM, "cpu", "platform", "not on cpu"),
        (PROBLEM, "cuda:7.5", "arch", "7.5"),
        (PROBLEM, "cuda:gfx942", "arch", "gfx942"),
        (replace(PROBLEM, dtype="float32"), "cuda", "dtype", "float32"),
        (replace(PROBLEM, in_features=0), "cuda", "shape", "in_features is 0"),
        (
            replace(with_weight(element=ElementType.FLOAT8_E5M2FNUZ), dtype="float16"),
            "cuda", "element", "float8_e5m2fnuz",
        ),
        (with_weight(granularity=PerGroup(3)), "cuda", "granularity", "groups of 3 inputs would be filled up to 16"),
        (with_weight(granularity=PerGroup(0)), "cuda", "granularity", "group size 0"),
        (with_weight(scale_dtype="float8_e5m2"), "cuda", "dtype", "float8_e5m2"),
        (
            replace(PROBLEM, segments=(SegmentSpec(64, WEIGHT), SegmentSpec(64, replace(WEIGHT, act_order=True)))),
            "cuda", "segments", "differ",
        ),
    ],
)  # fmt: skip
def test_a_refusal_names_what_failed(problem, platform, code, words):
    verdict = KERNEL.supports(problem, Platform.parse(platform))
    assert isinstance(verdict, Rejected)
    assert verdict.code == code
    assert words in verdict.reason


def test_a_size_that_no_tile_fits_costs_empty_slots_and_says_so():
    verdict = KERNEL.supports(with_weight(granularity=PerGroup(40)), Platform.parse("cuda:9.0"))
    assert isinstance(verdict, Accepted)
    assert "empty slots: 576 inputs are laid out as 768" in verdict.notes
    assert verdict.extra_bytes > 0


@pytest.mark.parametrize(
    ("size", "inputs", "width", "parts", "per_group", "count"),
    [
        (64, 576, 64, 1, 1, 576),
        (128, 1024, 128, 1, 2, 1024),
        (32, 96, 32, 2, 1, 128),
        (96, 192, 96, 2, 3, 192),
        (16, 48, 16, 4, 1, 64),
        (48, 96, 48, 4, 3, 128),
        (24, 96, 32, 2, 1, 128),
        (128, 96, 0, 0, 1, 128),
    ],
)
def test_scales_belong_to_parts_of_a_chunk(size, inputs, width, parts, per_group, count):
    slots = arrange_in_order(PerGroup(size), inputs)
    assert (slots.width, slots.parts, slots.per_group, slots.count) == (width, parts, per_group, count)
