"""The grouped FP8 kernel for experts on a GPU: the conformance class, what sums lose, real sizes, changing routers."""

from __future__ import annotations

import pytest
import torch
from device_checks import check_experts, check_that_a_graph_follows_the_router

from quantplug.activations import read_activation
from quantplug.expertfunction import between
from quantplug.expertweights import PreparedExperts
from quantplug.moe import ExpertFunction, MoEProblem
from quantplug.platform import Platform
from quantplug.spec import ElementType, PerChannel, PerTensor, WeightSpec
from quantplug_testkit.conformance.experts import MoEKernelConformance

if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
    pytest.skip("needs a GPU of compute capability 9.0", allow_module_level=True)

from quantplug_cublas import mixture, plain
from quantplug_cublas.experts import CublasExperts, FastCublasExperts
from quantplug_testkit.conformance.experts.case import ExpertCase
from quantplug_testkit.conformance.experts.hazard import family

KERNEL, GPU, CUDA = CublasExperts(), Platform.parse("cuda:9.0"), torch.device("cuda")
FLOAT8 = torch.float8_e4m3fn
ROWS = WeightSpec(ElementType.FLOAT8_E4M3FN, PerChannel(), "float32")
WHOLE = WeightSpec(ElementType.FLOAT8_E4M3FN, PerTensor(), "float32")
TOKEN, STATIC = "float8_e4m3fn/token/dynamic", "float8_e4m3fn/tensor/static"
HAZARDS = {
    hazard.family: hazard
    for hazard in (
        *family("many", ROWS, experts=40, top_k=6, hidden=256, intermediate=192, activation=TOKEN),
        *family("bias-odd", ROWS, experts=3, hidden=61, intermediate=33, bias=True, activation=TOKEN),
        *family("static-bias", WHOLE, ROWS, hidden=40, intermediate=24, bias=True, activation=STATIC),
        *family("on-input", ROWS, top_k=1, weight_on_input=True, bias=True, activation=TOKEN),
        *family("gelu", ROWS, function=ExpertFunction("gelu"), activation=TOKEN),
        *family("gelu-tanh", ROWS, function=ExpertFunction("gelu_tanh", gated=False), activation=TOKEN),
        *family("relu2", ROWS, function=ExpertFunction("relu2", gated=False), activation=STATIC),
        *family("limit", ROWS, function=ExpertFunction("silu", limit=1.0, alpha=1.702, up_offset=1.0),
                reach=4.0, activation=TOKEN),
    )
    if hazard.problem.dtype == "bfloat16"
}  # fmt: skip


class TestCublasExperts(MoEKernelConformance):
    kernel = KERNEL
    platform = GPU
    device = "cuda"


class TestFastCublasExperts(MoEKernelConformance):
    kernel = FastCublasExperts()
    platform = GPU
    device = "cuda"


@pytest.mark.parametrize("name", HAZARDS)
def test_what_the_catalogue_lacks_is_within_the_bound(name: str) -> None:
    case = ExpertCase(KERNEL, GPU, CUDA, HAZARDS[name])
    for rows in (1, 70):
        check_experts(case, rows)


@pytest.mark.parametrize(("name", "rows"), [("many", 90), ("static-bias", 270)])
def test_choices_that_two_launches_put_in_order_are_within_the_bound(name: str, rows: int) -> None:
    case = ExpertCase(KERNEL, GPU, CUDA, HAZARDS[name])
    check_experts(case, rows)


@pytest.mark.parametrize("name", ["many", "static-bias"])
def test_a_graph_follows_the_router(name: str) -> None:
    case = ExpertCase(KERNEL, GPU, CUDA, HAZARDS[name])
    for rows in (5, 90):
        check_that_a_graph_follows_the_router(case, rows)


@pytest.mark.parametrize(("rows", "n", "k"), [(1, 256, 1024), (300, 256, 1024), (300, 2048, 2048)])
def test_sums_lose_what_is_far_below_a_product_of_the_same_128_inputs_only(rows: int, n: int, k: int) -> None:
    """
    For each of the tiles that torch takes. What is small stands beside 1 and -1, which are 3 blocks apart, so that it
    is all that is left in bfloat16.
    """
    codes = torch.full((2, n, k), 2.0**-8, device="cuda").to(FLOAT8)
    ones, ends = torch.ones(2, n, device="cuda"), torch.tensor([rows, 2 * rows], dtype=torch.int32, device="cuda")
    for bits in (13, 14):
        lost = []
        for block in range(0, k, 128):
            x = torch.zeros(2 * rows, k, device="cuda")
            x[:, 300], x[:, 700] = 256, -256
            x[:, block + 77] = 2.0 ** (8 - bits)
            scales = torch.ones(2 * rows, device="cuda")
            y = mixture._multiply(x.to(FLOAT8), scales, codes, ones, ends, fast=False).float()
            lost.append(bool((y == 0).all()))
            assert lost[-1] or bool((y == 2.0**-bits).all())
        assert lost == [bits > 13 and block in (256, 640) for block in range(0, k, 128)]


def layer(experts: int, top_k: int, hidden: int, intermediate: int) -> PreparedExperts:
    """Return a layer of random codes without NaN, whose scales keep what lies between within bfloat16."""
    permission = read_activation(TOKEN, "here")
    problem = MoEProblem(
        experts, top_k, hidden, intermediate, (ROWS, ROWS), ROWS, ExpertFunction(), "bfloat16", activation=permission
    )
    generator = torch.Generator("cuda").manual_seed(0)
    tensors = {}
    for name, shape in (("w13", (experts, 2 * intermediate, hidden)), ("w2", (experts, hidden, intermediate))):
        octets = torch.randint(0, 256, shape, generator=generator, device="cuda", dtype=torch.uint8) & 0xBF
        tensors[f"{name}.codes"] = octets.view(FLOAT8)
        tensors[f"{name}.scales"] = torch.rand(shape[:2], generator=generator, device="cuda") / shape[2] ** 0.5
    return PreparedExperts(KERNEL.layout_id, problem, tensors, {"rounded": 0})


@pytest.mark.parametrize(("experts", "top_k", "hidden", "intermediate"), [(128, 8, 2048, 768), (8, 2, 4096, 14336)])
@pytest.mark.parametrize("rows", [1, 80, 3000])
def test_layers_of_real_sizes_are_near_the_float64_product(
    experts: int, top_k: int, hidden: int, intermediate: int, rows: int
) -> None:
    made = layer(experts, top_k, hidden, intermediate)
    x = torch.randn(rows, hidden, device="cuda", dtype=torch.bfloat16)
    ids = torch.rand(rows, experts, device="cuda").argsort(1)[:, :top_k]
    weights = torch.rand(rows, top_k, device="cuda")
    y = KERNEL.apply(x, weights, ids, made).double()
    wanted = torch.zeros_like(y)
    for expert in ids.unique().tolist():
        chosen, slots = (ids == expert).nonzero(as_tuple=True)
        # As the kernel does: h is quantized, and a code that roundings carry over a boundary is off by a whole step.
        sums = product(x[chosen], made, "w13", expert).bfloat16()
        output = product(between(sums.float(), made.problem.function), made, "w2", expert)
        wanted.index_add_(0, chosen, output * weights[chosen, slots, None])
    assert float((y - wanted).norm() / wanted.norm()) < 2**-6


def product(x: torch.Tensor, made: PreparedExperts, name: str, expert: int) -> torch.Tensor:
    """Return a product of quantized x in float64."""
    codes, scales = plain.by_tokens(x, x.shape[1], FLOAT8)
    weight = made.tensors[f"{name}.codes"][expert].double() * made.tensors[f"{name}.scales"][expert, :, None]
    return codes.double() * scales.double() @ weight.t()


def test_the_plain_way_serves_where_there_is_no_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    cases = [ExpertCase(KERNEL, GPU, CUDA, hazard) for hazard in HAZARDS.values()]
    monkeypatch.setattr(mixture, "_LAUNCHES", False)
    for case in cases:
        check_experts(case, 9)
