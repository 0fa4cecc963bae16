"""What the Triton kernel takes and refuses: the same answer on any machine, without a GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest

from quantplug.kernel import Accepted, Rejected
from quantplug.platform import Platform
from quantplug.spec import ElementType, LinearProblem, PerGroup, SegmentSpec, WeightSpec
from quantplug_triton.kernel import TritonKernel
from quantplug_triton.slots import arrange, group_sizes

KERNEL = TritonKernel()
WEIGHT = WeightSpec(ElementType.UINT4, PerGroup(64))
COARSE = replace(WEIGHT, granularity=PerGroup(128))
PROBLEM = LinearProblem(576, (SegmentSpec(1536, WEIGHT),), "bfloat16")


@pytest.mark.parametrize("platform", ["cuda", "cuda:8.0", "cuda:9.0", "cuda:12.0", "cuda:gfx942"])
def test_gpus_are_accepted_also_unseen(platform):
    verdict = KERNEL.supports(PROBLEM, Platform.parse(platform))
    assert isinstance(verdict, Accepted)
    assert verdict.casts == ()
    assert verdict.extra_bytes == 0


@pytest.mark.parametrize(
    ("problem", "platform", "code", "words"),
    [
        (PROBLEM, "cpu", "platform", "not on cpu"),
        (PROBLEM, "cuda:7.5", "arch", "7.5"),
        (replace(PROBLEM, dtype="float64"), "cuda", "dtype", "float64"),
        (replace(PROBLEM, in_features=0), "cuda", "shape", "in_features is 0"),
        (
            replace(PROBLEM, segments=(SegmentSpec(64, replace(WEIGHT, element=ElementType.FLOAT8_E4M3FNUZ)),)),
            "cuda", "element", "float8_e4m3fnuz",
        ),
        (
            replace(PROBLEM, segments=(SegmentSpec(64, replace(WEIGHT, granularity=PerGroup(1))),)),
            "cuda", "granularity", "groups of 1",
        ),
        (
            replace(PROBLEM, segments=(SegmentSpec(64, WEIGHT), SegmentSpec(64, COARSE))),
            "cuda", "segments", "differ",
        ),
    ],
)  # fmt: skip
def test_a_refusal_names_what_failed(problem, platform, code, words):
    verdict = KERNEL.supports(problem, Platform.parse(platform))
    assert isinstance(verdict, Rejected)
    assert verdict.code == code
    assert words in verdict.reason


@pytest.mark.parametrize(
    ("size", "inputs", "chunk", "per_group", "count"),
    [(64, 576, 32, 2, 576), (128, 1024, 64, 2, 1024), (32, 96, 16, 2, 96), (16, 48, 16, 1, 64), (48, 96, 16, 3, 96)],
)
def test_chunks_are_as_wide_as_groups_allow(size, inputs, chunk, per_group, count):
    slots = arrange(group_sizes(PerGroup(size), inputs), fields=2)
    assert (slots.chunk, slots.per_group, slots.count) == (chunk, per_group, count)
