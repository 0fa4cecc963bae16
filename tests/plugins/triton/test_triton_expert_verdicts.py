"""Which mixtures of experts the Triton kernel takes and refuses: the same answer on any machine, without a GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest

from quantplug.kernel import Accepted, Rejected
from quantplug.moe import ExpertFunction, MoEProblem
from quantplug.moeloop import LoopKernel
from quantplug.platform import Platform
from quantplug.spec import ElementType, PerGroup, WeightSpec
from quantplug_testkit.conformance.contract import ContractTests
from quantplug_testkit.conformance.experts.case import ExpertSubject
from quantplug_triton.experts import TritonExperts
from quantplug_triton.kernel import TritonKernel

KERNEL = TritonExperts()
GPU = Platform.parse("cuda:9.0")
INT4 = WeightSpec(ElementType.INT4, PerGroup(128))
QWEN = MoEProblem(128, 8, 2048, 768, (INT4, INT4), INT4, ExpertFunction(), "bfloat16")
MIXTRAL = replace(QWEN, experts=8, top_k=2, hidden=4096, intermediate=14336)


class TestWhatItSaysAboutItself(ExpertSubject, ContractTests):
    kernel = KERNEL
    platform = GPU

    @pytest.mark.xfail(reason="there is no GPU: tests/device asks", raises=(AssertionError, RuntimeError), strict=False)
    def test_probe_passes_on_this_machine(self):
        super().test_probe_passes_on_this_machine()


@pytest.mark.parametrize("platform", ["cuda", "cuda:8.0", "cuda:9.0", "cuda:12.0", "cuda:gfx942"])
def test_gpus_are_accepted_also_unseen(platform):
    verdict = KERNEL.supports(QWEN, Platform.parse(platform))
    assert isinstance(verdict, Accepted)
    assert verdict.casts == ()
    assert verdict.extra_bytes == 0
    assert not verdict.quantizes_x


@pytest.mark.parametrize(
    ("change", "platform", "code", "words"),
    [
        ({}, "cpu", "platform", "not on cpu"),
        ({}, "cuda:7.5", "arch", "7.5"),
        ({"dtype": "float64"}, "cuda", "dtype", "float64"),
        ({"experts": 0}, "cuda", "shape", "experts is 0"),
        ({"top_k": 0}, "cuda", "shape", "top_k is 0"),
        ({"hidden": 0}, "cuda", "shape", "hidden is 0"),
        ({"intermediate": -1}, "cuda", "shape", "intermediate is -1"),
        ({"router_weight_on_input": True}, "cuda", "shape", "top_k 8"),
        ({"function": ExpertFunction("mish")}, "cuda", "function", "mish"),
        ({"w13": (INT4, replace(INT4, granularity=PerGroup(64)))}, "cuda", "segments", "gate and up: segments differ"),
        ({"w2": replace(INT4, granularity=PerGroup(1))}, "cuda", "granularity", "down: groups of 1"),
        (
            {"w2": replace(INT4, element=ElementType.FLOAT8_E4M3FNUZ)},
            "cuda", "element", "down: codes are float8_e4m3fnuz",
        ),
    ],
)  # fmt: skip
def test_a_refusal_names_what_failed(change, platform, code, words):
    verdict = KERNEL.supports(replace(QWEN, **change), Platform.parse(platform))
    assert isinstance(verdict, Rejected)
    assert verdict.code == code
    assert words in verdict.reason


@pytest.mark.parametrize("problem", [QWEN, MIXTRAL], ids=["qwen3-30b-a3b", "mixtral-8x7b"])
def test_it_is_estimated_to_be_faster_than_the_loop(problem):
    """For a single row, by which layouts are chosen: for more, the loop counts the experts of one row only."""
    loop = LoopKernel(TritonKernel()).supports(problem, GPU)
    ours = KERNEL.supports(problem, GPU)
    assert ours.cost.at(1) < loop.cost.at(1)
    assert ours.cost.at(1) < ours.cost.at(16) < ours.cost.at(256)


def test_few_rows_read_their_experts_and_many_read_all_of_them_once():
    cost = KERNEL.supports(QWEN, GPU).cost
    # 8 of 128 experts for a row; from 16 rows on there cannot be more than all.
    assert cost.at(2) - cost.at(1) > 10 * (cost.at(512) - cost.at(511))
    # Every expert's codes and scales at the rate that the linear kernel is estimated to read at.
    assert cost.at(512) - cost.many.row_us * 512 > QWEN.stored_bytes / 1.8e6
