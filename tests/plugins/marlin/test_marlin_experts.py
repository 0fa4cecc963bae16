"""The kernel for experts without a GPU: what it answers, and its layout and back."""

from __future__ import annotations

import re
from dataclasses import replace
from importlib.resources import files

import pytest
import torch

from quantplug.errors import LoadError
from quantplug.expertlimits import FUNCTIONS
from quantplug.expertweights import ExpertWeights
from quantplug.kernel import Accepted, Cast, Rejected
from quantplug.moe import ExpertFunction, MoEProblem
from quantplug.platform import Platform
from quantplug.spec import ElementType, PerGroup, WeightSpec
from quantplug.weight import Weight
from quantplug_marlin.device import Target
from quantplug_marlin.experts import MarlinExperts
from quantplug_marlin.form import decode
from quantplug_marlin.kernel import MarlinKernel
from quantplug_marlin.mixture import rows_per_block
from quantplug_marlin.routing import most_blocks
from quantplug_testkit.canonical import weight_tensors
from quantplug_testkit.compare import assert_bitwise_equal
from quantplug_testkit.conformance.case import Subject
from quantplug_testkit.conformance.contract import ContractTests
from quantplug_testkit.conformance.experts.case import ExpertSubject
from quantplug_testkit.conformance.experts.problems import EXPERT_CATALOGUE

KERNEL = MarlinExperts()
GPU = Platform.parse("cuda:9.0")
CPU = torch.device("cpu")
INT4 = WeightSpec(ElementType.INT4, PerGroup(32))
PROBLEM = MoEProblem(8, 2, 128, 64, (INT4, INT4), INT4, ExpertFunction(), "bfloat16")
FAMILIES = {
    hazard.family: hazard
    for hazard in EXPERT_CATALOGUE
    if hazard.problem.activation is None and isinstance(KERNEL.supports(hazard.problem, GPU), Accepted)
}


class TestAnswersAboutLinearLayers(Subject, ContractTests):
    kernel = MarlinKernel()
    platform = GPU
    test_probe_passes_on_this_machine = None  # which is any machine here


class TestAnswersAboutExperts(ExpertSubject, ContractTests):
    kernel = KERNEL
    platform = GPU
    test_probe_passes_on_this_machine = None


def test_what_an_expert_gives_is_rounded_and_nothing_else():
    verdict = KERNEL.supports(PROBLEM, GPU)
    assert isinstance(verdict, Accepted)
    assert verdict.casts == (Cast("expert", "bfloat16"),)
    assert verdict.extra_bytes == 0


@pytest.mark.parametrize(
    ("changes", "code", "words"),
    [
        ({"experts": 4096}, "shape", "4096 experts"),
        ({"top_k": 2, "router_weight_on_input": True}, "shape", "top_k 2"),
        ({"w2": replace(INT4, act_order=True)}, "act_order", "order of inputs"),
        ({"w2": replace(INT4, granularity=PerGroup(24))}, "granularity", "groups of 24 inputs are filled up to 32"),
        ({"w13": (INT4, replace(INT4, scale_dtype="float32"))}, "segments", "gate and up differ"),
        ({"w13": (INT4,)}, "segments", "1 projections"),
        ({"dtype": "float32"}, "dtype", "float32"),
        ({"hidden": 0}, "shape", "hidden is 0"),
    ],
)
def test_a_refusal_names_what_failed(changes, code, words):
    verdict = KERNEL.supports(replace(PROBLEM, **changes), GPU)
    assert isinstance(verdict, Rejected)
    assert verdict.code == code
    assert words in verdict.reason


def test_all_families_but_those_in_an_order_of_their_own_are_accepted():
    half = [h for h in EXPERT_CATALOGUE if h.problem.activation is None and h.problem.dtype == "float16"]
    reasons = {KERNEL.supports(h.problem, GPU).code for h in half if h.family not in FAMILIES}
    assert reasons <= {"act_order", "segments", "granularity"}
    assert len(FAMILIES) > 45


@pytest.mark.parametrize("hazard", FAMILIES.values(), ids=lambda hazard: hazard.family)
def test_the_way_back_gives_every_bit_again(hazard):
    problem = hazard.problem
    given = [hazard.expert(number) for number in range(problem.experts)]
    prepared = KERNEL.prepare(problem, given, CPU)
    for number in {0, problem.experts - 1}:
        found = KERNEL.unprepare(prepared, number)
        for one, other in zip((*found.w13, found.w2), (*given[number].w13, given[number].w2), strict=True):
            ours, theirs = weight_tensors(one), weight_tensors(other)
            assert ours.keys() == theirs.keys()
            for name, tensor in theirs.items():
                assert_bitwise_equal(ours[name], tensor, name)


@pytest.mark.parametrize(
    ("choices", "experts", "rows"),
    [(1, 8, 8), (8, 128, 8), (128, 128, 8), (2048, 128, 16), (32768, 128, 64), (64, 2, 32)],
)
def test_blocks_have_as_many_rows_as_an_expert_has_on_average(choices, experts, rows):
    assert rows_per_block(choices, experts, Target((8, 0), 108, 163 << 10)) == rows


@pytest.mark.parametrize(
    ("choices", "experts", "rows"),
    [(128, 128, 8), (2048, 128, 32), (512, 8, 96), (8192, 8, 128), (1024, 64, 32), (256, 8, 48)],
)
def test_with_warpgroups_nearly_every_expert_has_one_block(choices, experts, rows):
    assert rows_per_block(choices, experts, Target((9, 0), 132, 227 << 10)) == rows


@pytest.mark.parametrize("rows", [8, 16, 64])
def test_blocks_suffice_however_choices_fall(rows):
    for counts in ([1] * 20, [rows + 1] * 5, [0, 0, 7 * rows], [1, rows, rows + 1, 0], [3]):
        needed = sum(-(-count // rows) for count in counts)
        assert needed <= most_blocks(sum(counts), len(counts), rows)


def test_scales_multiply_codes_only_where_those_of_all_experts_can():
    spec = WeightSpec(ElementType.FLOAT8_E4M3FN, PerGroup(32), "float8_e8m0fnu")
    problem = replace(PROBLEM, experts=2, w13=(spec, spec), w2=spec)

    def expert(exponent: int) -> ExpertWeights:
        def weight(rows: int, inputs: int) -> Weight:
            scales = torch.full((rows, inputs // 32), 2.0**exponent).to(torch.float8_e8m0fnu)
            return Weight(torch.zeros(rows, inputs, dtype=torch.float8_e4m3fn), scales, spec)

        return ExpertWeights((weight(64, 128), weight(64, 128)), weight(128, 64))

    exact = KERNEL.prepare(problem, [expert(-7), expert(-6)], CPU)
    mixed = KERNEL.prepare(problem, [expert(-7), expert(40)], CPU)
    for name, scale in (("w13.form", "bfloat16"), ("w2.form", "bfloat16")):
        assert decode(exact.meta[name], half=False, scale=scale).exact
        assert not decode(mixed.meta[name], half=False, scale=scale).exact
    with pytest.raises(LoadError, match="QP-LOAD-PREPARE"):
        KERNEL.prepare(problem, [expert(-7), expert(40)], CPU, exact)
    assert KERNEL.prepare(problem, [expert(-7), expert(-8)], CPU, exact) is exact


def test_functions_are_numbered_as_the_source_numbers_them():
    text = files("quantplug_marlin").joinpath("cuda", "functions.cuh").read_text(encoding="utf-8")
    numbered = re.search(r"FUNCTION \(([^)]*)\)", text)[1]
    assert numbered.split(", ") == [f"{number} {name}" for number, name in enumerate(FUNCTIONS)]
