"""What the humming kernel for experts takes and refuses: without a GPU."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest

from quantplug.kernel import Accepted, Cast, Rejected
from quantplug.moe import ExpertFunction, MoEProblem
from quantplug.platform import Platform
from quantplug.spec import ElementType, PerChannel, PerGroup, PerTensor, WeightSpec
from quantplug_humming.experts import HummingExperts
from quantplug_humming.probe import probe, probe_experts
from quantplug_testkit.conformance.contract import ContractTests
from quantplug_testkit.conformance.experts import EXPERT_CATALOGUE
from quantplug_testkit.conformance.experts.case import ExpertSubject

KERNEL, GPU = HummingExperts(), Platform.parse("cuda:9.0")
INT4 = WeightSpec(ElementType.INT4, PerGroup(128), "float16")
MXFP4 = WeightSpec(ElementType.FLOAT4_E2M1FN, PerGroup(32), "float8_e8m0fnu")
FP8 = WeightSpec(ElementType.FLOAT8_E4M3FN, PerChannel(), "float32")
PROBLEM = MoEProblem(8, 2, 256, 128, (INT4, INT4), INT4, ExpertFunction(), "bfloat16")
ALWAYS = ("splits", "gate_up", "expert")


class TestAnswersAboutExperts(ExpertSubject, ContractTests):
    kernel = KERNEL
    platform = GPU
    test_probe_passes_on_this_machine = None  # which is any machine here


@pytest.mark.parametrize(
    ("changes", "casts"),
    [
        ({}, ("scales", "weights")),
        ({"bias": True}, ("scales", "weights", "partials")),
        ({"w13": (MXFP4, MXFP4), "w2": MXFP4}, ()),
        ({"w13": (FP8, FP8), "w2": MXFP4}, ("scales", "partials")),
        # gate and up have a scale each, so that it is that of a row; down has one
        ({"w13": (replace(FP8, granularity=PerTensor()),) * 2, "w2": replace(FP8, granularity=PerTensor())},
         ("scales", "partials")),
    ],
)  # fmt: skip
def test_what_is_taken_declares_its_roundings(changes, casts):
    verdict = KERNEL.supports(replace(PROBLEM, **changes), GPU)
    assert isinstance(verdict, Accepted)
    assert sorted(cast.what for cast in verdict.casts) == sorted((*casts, *ALWAYS))
    assert {cast.dtype for cast in verdict.casts} == {"bfloat16"}
    assert Cast("expert", "bfloat16") in verdict.casts
    assert not verdict.quantizes_x


def test_what_fills_up_is_declared():
    verdict = KERNEL.supports(PROBLEM, GPU)
    assert verdict.extra_bytes == 0
    # gate and up of 132 rows each: 136, together 272, which is held as 384; 136 inputs are held as 256
    odd = KERNEL.supports(replace(PROBLEM, intermediate=132, bias=True), GPU)
    codes = (384 * 256 + 256 * 256 - 3 * 132 * 256) // 2
    scales = 2 * (384 * 2 + 256 * 2 - 2 * 132 * 2 - 256 * 2)
    assert odd.extra_bytes == 8 * (codes + scales + 2 * (384 - 264))
    assert odd.notes == ("filled up to [384, 256]", "filled up to [256, 256]")


@pytest.mark.parametrize(
    ("sizes", "measured"),
    [
        ({"experts": 128, "top_k": 8, "hidden": 2048, "intermediate": 768}, {1: 27.4, 16: 94.2, 256: 158.8, 4096: 806}),
        ({"hidden": 4096, "intermediate": 14336}, {1: 83.9, 16: 263.8, 256: 482.1, 4096: 5522.9}),
    ],
)
def test_the_estimate_is_near_what_was_measured(sizes, measured):
    """On one H100, see the README; how many experts few rows take depends on the router."""
    verdict = KERNEL.supports(replace(PROBLEM, **sizes), GPU)
    for rows, us in measured.items():
        assert 0.7 < verdict.cost.at(rows) / us < 1.5


@pytest.mark.parametrize(
    ("changes", "code", "words"),
    [
        ({"experts": 4096}, "shape", "4096 experts"),
        ({"top_k": 2, "router_weight_on_input": True}, "shape", "top_k 2"),
        ({"w2": replace(INT4, act_order=True)}, "act_order", "g_idx"),
        ({"w2": replace(INT4, granularity=PerGroup(24))}, "granularity", "groups of 24"),
        ({"w2": replace(MXFP4, granularity=PerChannel())}, "granularity", "per channel"),
        ({"w13": (INT4, replace(INT4, scale_dtype="float32"))}, "segments", "segments differ"),
        ({"w13": (INT4,)}, "segments", "1 projections"),
        ({"function": ExpertFunction("swish")}, "function", "the function swish"),
        ({"dtype": "float16"}, "dtype", "float16"),
        ({"hidden": 0}, "shape", "hidden is 0"),
    ],
)
def test_a_refusal_names_what_failed(changes, code, words):
    verdict = KERNEL.supports(replace(PROBLEM, **changes), GPU)
    assert isinstance(verdict, Rejected)
    assert verdict.code == code
    assert words in verdict.reason
    assert verdict.fix


def test_families_are_refused_for_their_weights_only():
    asked = [hazard for hazard in EXPERT_CATALOGUE if hazard.problem.dtype == "bfloat16"]
    verdicts = [KERNEL.supports(hazard.problem, GPU) for hazard in asked]
    assert {each.code for each in verdicts if isinstance(each, Rejected)} == {
        "element", "granularity", "dtype", "act_order", "segments",
    }  # fmt: skip
    assert sum(isinstance(each, Accepted) for each in verdicts) > 45


def test_the_probe_asks_for_both_packages(stand_in, monkeypatch):
    assert KERNEL.probe(Platform.parse("cpu")) is None
    for remembered in (probe, probe_experts):
        remembered.cache_clear()
    assert probe_experts() is None
    probe_experts.cache_clear()
    monkeypatch.setitem(sys.modules, "triton", None)
    refusal = KERNEL.probe(GPU)
    assert (refusal.code, refusal.fix) == ("dependency", "pip install triton")
    for remembered in (probe, probe_experts):
        remembered.cache_clear()
    monkeypatch.setitem(sys.modules, "humming", None)
    assert KERNEL.probe(GPU).fix == "pip install humming-kernels"
    for remembered in (probe, probe_experts):
        remembered.cache_clear()


def test_the_kernel_is_found_by_its_entry_point():
    from quantplug.plugins import registry

    assert registry().moe_kernel("humming.moe").plugin == "quantplug-humming"
