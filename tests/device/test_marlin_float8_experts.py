"""The CUDA C++ kernel for experts in FP8 on a GPU: the conformance class, cuts, what sums lose, changing routers."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
from device_checks import check_experts, check_that_a_graph_follows_the_router

from quantplug.activations import read_activation
from quantplug.expertweights import ExpertWeights
from quantplug.moe import ExpertFunction, MoEProblem
from quantplug.platform import Platform
from quantplug.spec import ElementType, PerChannel, PerTensor, WeightSpec
from quantplug.weight import Weight
from quantplug_testkit.conformance.experts import MoEKernelConformance
from quantplug_testkit.conformance.experts.case import ExpertCase
from quantplug_testkit.conformance.experts.hazard import family

if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
    pytest.skip("needs a GPU of compute capability 9.0", allow_module_level=True)

from quantplug_marlin import float8mixture
from quantplug_marlin.device import target_of
from quantplug_marlin.float8cut import Float8Cut, every_cut
from quantplug_marlin.float8experts import MarlinFloat8Experts

KERNEL = MarlinFloat8Experts()
GPU, CUDA = Platform.parse("cuda:9.0"), torch.device("cuda")
FLOAT8 = torch.float8_e4m3fn
ROWS = WeightSpec(ElementType.FLOAT8_E4M3FN, PerChannel(), "float32")
WHOLE = WeightSpec(ElementType.FLOAT8_E4M3FN, PerTensor(), "float32")
TOKEN = "float8_e4m3fn/token/dynamic"
HAZARDS = {
    f"{hazard.family}-{hazard.problem.dtype}": hazard
    for hazard in (
        *family("many", ROWS, experts=40, top_k=6, hidden=256, intermediate=192, activation=TOKEN),
        *family("bias-odd", ROWS, experts=3, hidden=61, intermediate=33, bias=True, activation=TOKEN),
        *family("one-scale", WHOLE, hidden=40, intermediate=24, activation=TOKEN),
        *family("on-input", ROWS, top_k=1, weight_on_input=True, bias=True, activation=TOKEN),
        *family("relu2", ROWS, function=ExpertFunction("relu2", gated=False), activation=TOKEN),
        *family("limit", ROWS, function=ExpertFunction("silu", limit=1.0, alpha=1.702, up_offset=1.0), reach=4.0,
                activation=TOKEN),
        *family("long", ROWS, experts=2, hidden=2600, intermediate=1300, activation=TOKEN),
    )
    if hazard.problem.dtype in {"bfloat16", "float16"}
}  # fmt: skip


class TestMarlinFloat8Experts(MoEKernelConformance):
    kernel = KERNEL
    platform = GPU
    device = "cuda"


@pytest.mark.parametrize("name", HAZARDS)
def test_what_the_catalogue_lacks_is_within_the_bound(name: str) -> None:
    case = ExpertCase(KERNEL, GPU, CUDA, HAZARDS[name])
    for rows in (1, 70, 300):
        check_experts(case, rows)


CUTS = every_cut(target_of(0))
K = 650


def check_cut(dtype: str, cut: Float8Cut, inputs: int) -> None:
    """Hold both products, cut like this, against the bound: outputs are no multiple of what a piece has of them."""
    layers = family("cut", ROWS, experts=2, hidden=inputs, intermediate=330, bias=True, activation=TOKEN)
    (hazard,) = (layer for layer in layers if layer.problem.dtype == dtype)
    case = ExpertCase(KERNEL, GPU, CUDA, hazard)
    with patch.object(float8mixture, "choose", lambda *_: cut):
        for rows in (3, 300):
            check_experts(case, rows)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("cut", CUTS, ids=str)
@pytest.mark.parametrize("inputs", [100, K])
def test_every_cut_is_within_the_bound(dtype: str, cut: Float8Cut, inputs: int) -> None:
    check_cut(dtype, cut, inputs)


@pytest.mark.parametrize("name", ["many-bfloat16", "bias-odd-bfloat16"])
def test_a_graph_follows_the_router(name: str) -> None:
    case = ExpertCase(KERNEL, GPU, CUDA, HAZARDS[name])
    for rows in (5, 270):
        check_that_a_graph_follows_the_router(case, rows)


def test_the_operator_keeps_torchs_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    case, calls = ExpertCase(KERNEL, GPU, CUDA, HAZARDS["bias-odd-bfloat16"]), []
    operator = float8mixture.float8_experts
    monkeypatch.setattr(float8mixture, "float8_experts", lambda *given: calls.append(given) or operator(*given))
    case.apply(case.inputs(3), case.route(3))
    # Not test_schema, which compares operands by operators that torch does not have for 8-bit floats.
    torch.library.opcheck(operator, calls[0], test_utils=("test_faketensor", "test_aot_dispatch_dynamic"))


@pytest.mark.parametrize("rows", [1, 300, 3000])
def test_sums_lose_what_is_far_below_a_product_of_the_same_128_inputs_only(rows: int) -> None:
    """
    Of the first product, with relu between and the identity as the second. What is small stands beside 1.75 and -1.75,
    which are 3 groups apart, so that it is all that is left.
    """
    hidden, width = 1024, 256
    permission = read_activation(TOKEN, "here")
    relu = ExpertFunction("relu", gated=False)
    problem = MoEProblem(1, 1, hidden, width, (ROWS,), ROWS, relu, "bfloat16", activation=permission)
    up = Weight(torch.full((width, hidden), 2.0**-8).to(FLOAT8), torch.ones(width, 1), ROWS)
    down = Weight(torch.eye(hidden, width).to(FLOAT8), torch.ones(hidden, 1), ROWS)
    ids = torch.zeros(rows, 1, dtype=torch.int64, device=CUDA)
    weights = torch.ones(rows, 1, device=CUDA)
    prepared = KERNEL.prepare(problem, [ExpertWeights((up,), down)], CUDA)
    for bits, lost in ((13, []), (14, [256, 640])):
        found = []
        for group in range(0, hidden, 128):
            x = torch.zeros(rows, hidden, dtype=torch.bfloat16, device=CUDA)
            x[:, 300], x[:, 700], x[:, group + 77] = 448, -448, 2.0 ** (8 - bits)
            y = KERNEL.apply(x, weights, ids, prepared)[:, :width].float()
            assert bool((y == 0).all()) or bool((y == 2.0**-bits).all())
            found += [group] if bool((y == 0).all()) else []
        assert found == lost
