"""The humming kernels for experts in FP8 on a GPU: the conformance class, what sums lose, changing routers."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from device_checks import check_experts, check_that_a_graph_follows_the_router

from quantplug.activations import read_activation
from quantplug.expertweights import ExpertWeights
from quantplug.moe import ExpertFunction, MoEProblem
from quantplug.platform import Platform
from quantplug.spec import ElementType, PerBlock, PerChannel, PerTensor, WeightSpec
from quantplug.weight import Weight
from quantplug_testkit.conformance.experts import MoEKernelConformance
from quantplug_testkit.conformance.experts.case import ExpertCase
from quantplug_testkit.conformance.experts.hazard import family

if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
    pytest.skip("needs a GPU of compute capability 9.0", allow_module_level=True)

pytest.importorskip("humming", reason="humming-kernels is not installed here", exc_type=ImportError)
pytest.importorskip("triton", reason="triton is not installed here")

from quantplug_humming import mixture
from quantplug_humming.choice import Choice, choose
from quantplug_humming.float8experts import FastFloat8HummingExperts, Float8HummingExperts

KERNEL, FAST = Float8HummingExperts(), FastFloat8HummingExperts()
GPU, CUDA = Platform.parse("cuda:9.0"), torch.device("cuda")
FLOAT8 = torch.float8_e4m3fn
ROWS = WeightSpec(ElementType.FLOAT8_E4M3FN, PerChannel(), "float32")
WHOLE = WeightSpec(ElementType.FLOAT8_E4M3FN, PerTensor(), "float32")
BLOCKS = WeightSpec(ElementType.FLOAT8_E4M3FN, PerBlock(128, 128), "float32")
TOKEN, GROUP = "float8_e4m3fn/token/dynamic", "float8_e4m3fn/group128/dynamic"
HAZARDS = {
    hazard.family: hazard
    for hazard in (
        *family("many", ROWS, experts=40, top_k=6, hidden=256, intermediate=192, activation=TOKEN),
        *family("bias-odd", ROWS, experts=3, hidden=61, intermediate=33, bias=True, activation=TOKEN),
        *family("one-scale", WHOLE, hidden=40, intermediate=24, activation=TOKEN),
        *family("on-input", ROWS, top_k=1, weight_on_input=True, bias=True, activation=TOKEN),
        *family("relu2", ROWS, function=ExpertFunction("relu2", gated=False), activation=TOKEN),
        *family("limit", ROWS, function=ExpertFunction("silu", limit=1.0, alpha=1.702, up_offset=1.0), reach=4.0,
                activation=TOKEN),
        *family("blocks-odd", BLOCKS, hidden=200, intermediate=256, bias=True, activation=GROUP),
    )
    if hazard.problem.dtype == "bfloat16"
}  # fmt: skip


class TestFloat8HummingExperts(MoEKernelConformance):
    kernel = KERNEL
    platform = GPU
    device = "cuda"


class TestFastFloat8HummingExperts(MoEKernelConformance):
    kernel = FAST
    platform = GPU
    device = "cuda"


@pytest.mark.parametrize("name", HAZARDS)
def test_what_the_catalogue_lacks_is_within_the_bound(name: str) -> None:
    case = ExpertCase(KERNEL, GPU, CUDA, HAZARDS[name])
    for rows in (1, 70):
        check_experts(case, rows)


def test_choices_that_two_launches_put_in_order_are_within_the_bound() -> None:
    case = ExpertCase(KERNEL, GPU, CUDA, HAZARDS["many"])
    check_experts(case, 270)


@pytest.mark.parametrize("name", ["many", "blocks-odd"])
def test_a_graph_follows_the_router(name: str) -> None:
    case = ExpertCase(KERNEL, GPU, CUDA, HAZARDS[name])
    for rows in (5, 270):
        check_that_a_graph_follows_the_router(case, rows)


@pytest.mark.parametrize("rows", [1, 300, 3000])
def test_sums_lose_what_is_far_below_a_product_of_the_same_128_inputs_only(
    rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    Of the first product, with relu between and the identity as the second. What is small stands beside 1.75 and -1.75,
    which are 3 groups apart, so that it is all that is left. Fast sums have one accumulator: they lose it wherever it
    stands before -1.75, also ahead of 1.75, whose coming pushes it out. Sums are not cut into parts here.
    """

    def whole(*asked: Any) -> Choice:
        choice = choose(*asked)
        return choice._replace(tuning=json.dumps(json.loads(choice.tuning) | {"use_stream_k": False}))

    monkeypatch.setattr(mixture, "choose", whole)
    hidden, width = 1024, 256
    permission = read_activation(TOKEN, "here")
    relu = ExpertFunction("relu", gated=False)
    problem = MoEProblem(1, 1, hidden, width, (ROWS,), ROWS, relu, "bfloat16", activation=permission)
    up = Weight(torch.full((width, hidden), 2.0**-8).to(FLOAT8), torch.ones(width, 1), ROWS)
    down = Weight(torch.eye(hidden, width).to(FLOAT8), torch.ones(hidden, 1), ROWS)
    ids = torch.zeros(rows, 1, dtype=torch.int64, device=CUDA)
    weights = torch.ones(rows, 1, device=CUDA)
    prepared = KERNEL.prepare(problem, [ExpertWeights((up,), down)], CUDA)
    groups = range(0, hidden, 128)
    for bits, kernel, lost in ((13, KERNEL, []), (14, KERNEL, [256, 640]), (14, FAST, [0, 128, 256, 384, 512])):
        found = []
        for group in groups:
            x = torch.zeros(rows, hidden, dtype=torch.bfloat16, device=CUDA)
            x[:, 300], x[:, 700], x[:, group + 77] = 448, -448, 2.0 ** (8 - bits)
            y = kernel.apply(x, weights, ids, prepared)[:, :width].float()
            assert bool((y == 0).all()) or bool((y == 2.0**-bits).all())
            found += [group] if bool((y == 0).all()) else []
        assert found == lost
