"""Experts in stacks: which of them are read, what a call shares, what a layer holds, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from cpu_layers import CPU, spec

from quantplug.expertweights import ExpertWeights, PreparedExperts
from quantplug.kernel import Accepted, Cast, Rejected
from quantplug.moe import ExpertFunction, MoEProblem
from quantplug.moeloop import LoopKernel
from quantplug.platform import Platform
from quantplug.spec import ActivationSpec, ElementType, PerChannel, WeightSpec
from quantplug.weight import Prepared, Weight
from quantplug_cpu import routed
from quantplug_cpu.experts import (
    DenseExperts,
    Float4Experts,
    Int4Experts,
    Int8Experts,
    StackedKernel,
    W8A8Experts,
)
from quantplug_cpu.stacked import Stack, stacks
from quantplug_testkit.canonical import make_weight
from quantplug_testkit.compare import assert_bitwise_equal

INT4 = spec("int4", 32, scales="bfloat16")
UINT4 = spec("uint4", 32)
INT8 = spec("int8", PerChannel(), scales="bfloat16")
MXFP4 = spec("float4_e2m1fn", 32, scales="float8_e8m0fnu")
FP8 = spec("float8_e4m3fn", PerChannel(), scales="float32")
PER_TOKEN = ActivationSpec(ElementType.INT8, "token", dynamic=True)

KERNELS: list[tuple[StackedKernel, WeightSpec]] = [
    (Int4Experts(), INT4),
    (Int8Experts(), INT8),
    (Int8Experts(), spec("int8", 32)),
    (Float4Experts(), MXFP4),
    (DenseExperts(), FP8),
    (W8A8Experts(), INT8),
]
EACH = pytest.mark.parametrize(("kernel", "kind"), KERNELS, ids=lambda value: getattr(value, "name", None))


def problem(kind: WeightSpec, *, top_k: int = 2, experts: int = 6, dtype: str = "bfloat16", bias: bool = False):
    """Return experts `[64, 96]`, all of one contract."""
    activation = PER_TOKEN if kind is INT8 else None
    return MoEProblem(experts, top_k, 96, 64, (kind, kind), kind, ExpertFunction(), dtype, bias, activation)


def experts(asked: MoEProblem, seed: int = 0) -> Iterator[ExpertWeights]:
    """Yield random experts of a problem, each made when it is asked for."""
    generator = np.random.default_rng(seed)
    dtype = getattr(torch, asked.dtype)
    for _ in range(asked.experts):
        w13 = tuple(make_weight(kind, asked.intermediate, asked.hidden, generator) for kind in asked.w13)
        b13 = tuple(torch.randn(asked.intermediate).to(dtype) for _ in asked.w13) if asked.bias else ()
        b2 = torch.randn(asked.hidden).to(dtype) if asked.bias else None
        w2 = make_weight(asked.w2, asked.hidden, asked.intermediate, generator)
        yield ExpertWeights(w13, w2, b13, b2, (None,) * len(w13))


def prepared(kernel: StackedKernel, asked: MoEProblem, seed: int = 0, out: PreparedExperts | None = None):
    """Return a layer of random experts."""
    return kernel.prepare(asked, experts(asked, seed), torch.device("cpu"), out)


def rows(asked: MoEProblem, ids: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return x, weights and ids for rows that choose these experts."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(len(ids), asked.hidden, generator=generator).to(getattr(torch, asked.dtype))
    return x, torch.rand(len(ids), asked.top_k, generator=generator), torch.tensor(ids)


class Watched(list[torch.Tensor]):
    """Views of experts that note which of them somebody asks for."""

    def __init__(self, views: list[torch.Tensor], seen: set[int]) -> None:
        super().__init__(views)
        self.seen = seen

    def __getitem__(self, index):
        self.seen.add(index)
        return super().__getitem__(index)


# -- only experts that have rows are read ---------------------------------------------------------------------------


@EACH
def test_only_experts_with_rows_are_looked_at(kernel: StackedKernel, kind: WeightSpec) -> None:
    asked = problem(kind, bias=True)
    layer = prepared(kernel, asked)
    seen: list[set[int]] = []
    parts = []
    for part in stacks(layer):
        seen.append(set())
        parts.append(replace(part, views={name: Watched(list(views), seen[-1]) for name, views in part.views.items()}))
    watched = replace(layer, parts=tuple(parts))
    for ids, active in (([[4, 1]], {1, 4}), ([[3, -1], [3, 3]], {3}), ([[-1, 6]], set())):
        x, weights, topk_ids = rows(asked, ids)
        assert_bitwise_equal(kernel.apply(x, weights, topk_ids, watched), kernel.apply(x, weights, topk_ids, layer))
        assert seen == [active, active]
        for each in seen:
            each.clear()


@EACH
def test_what_other_experts_hold_does_not_matter(kernel: StackedKernel, kind: WeightSpec) -> None:
    """Their memory is all ones: scales that are NaN, codes that are the largest."""
    asked = problem(kind, bias=True)
    layer, clean = prepared(kernel, asked), prepared(kernel, asked)
    shared = {name for name in layer.named_tensors() if "columns" in name}
    torch.manual_seed(0)
    for (name, tensor), untouched in zip(layer.named_tensors().items(), clean.named_tensors().values(), strict=True):
        untouched.copy_(tensor)
        if name not in shared:
            for idle in (0, 2, 3, 5):
                tensor[idle].view(-1).view(torch.uint8).fill_(0xFF)
    x, weights, topk_ids = rows(asked, [[4, 1], [1, 1], [-1, 4]])
    assert_bitwise_equal(kernel.apply(x, weights, topk_ids, layer), kernel.apply(x, weights, topk_ids, clean))


# -- what a call shares ---------------------------------------------------------------------------------------------


@EACH
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_two_experts_a_row_give_what_the_loop_gives(kernel: StackedKernel, kind: WeightSpec, dtype: str) -> None:
    """To the bit: products are the same, and the order of two terms does not matter."""
    asked = problem(kind, dtype=dtype, bias=True)
    loop = LoopKernel(kernel.linear)
    torch.manual_seed(0)
    layer = prepared(kernel, asked)
    torch.manual_seed(0)
    looped = loop.prepare(asked, experts(asked), torch.device("cpu"))
    for ids in ([[5, 0]], [[0, 3], [3, 5], [-1, 0], [4, 3]], [[2, 4]] * 70):
        given = rows(asked, ids)
        assert_bitwise_equal(kernel.apply(*given, layer), loop.apply(*given, looped))


@EACH
def test_turns_do_not_change_a_result(kernel: StackedKernel, kind: WeightSpec, monkeypatch) -> None:
    """Experts that are run one at a time, in twos, or all at once."""
    asked = problem(kind, top_k=3)
    layer, given = prepared(kernel, asked), rows(asked, [[0, 3, 1], [3, 5, 2], [-1, 0, 0], [4, 3, 5]])
    whole = kernel.apply(*given, layer)
    turns = []
    product = routed._product
    monkeypatch.setattr(routed, "_product", lambda *which: turns.append(which) or product(*which))
    for most in (1, 4 * 128):
        turns.clear()
        monkeypatch.setattr(routed, "_MOST_ELEMENTS", most)
        assert_bitwise_equal(kernel.apply(*given, layer), whole)
        assert len(turns) == 2 * (6 if most == 1 else 3)


def with_ones(weight: Weight) -> Weight:
    return replace(weight, scales=torch.ones_like(weight.scales))


def test_gradients_reach_x_and_the_router() -> None:
    """In small integers and float32, where nothing is rounded, they are those of the dense computation."""
    asked = replace(problem(spec("int4", 32, scales="float32"), dtype="float32"), function=ExpertFunction("relu"))
    given = [replace(e, w13=tuple(with_ones(w) for w in e.w13), w2=with_ones(e.w2)) for e in experts(asked)]
    x, _, topk_ids = rows(asked, [[0, 3], [3, 5], [-1, 0]])
    x, weights = x.round().requires_grad_(), torch.tensor([[0.5, 0.25], [1, 2], [4, 0.5]], requires_grad=True)
    kernel = Int4Experts()
    kernel.apply(x, weights, topk_ids, kernel.prepare(asked, given, torch.device("cpu"))).sum().backward()
    other, factors = x.detach().double().requires_grad_(), weights.detach().double().requires_grad_()
    total = torch.zeros((), dtype=torch.float64)
    for row, chosen in enumerate(topk_ids.tolist()):
        for place, expert in enumerate(chosen):
            if expert >= 0:
                gate, up, down = (w.dequantize(torch.float32).double() for w in (*given[expert].w13, given[expert].w2))
                inner = torch.relu(gate @ other[row]) * (up @ other[row])
                total = total + (factors[row, place] * (down @ inner)).sum()
    total.backward()
    assert_bitwise_equal(x.grad.double(), other.grad)
    assert_bitwise_equal(weights.grad.double(), factors.grad)


def test_the_operator_of_compiled_models_is_registered_as_it_should_be() -> None:
    asked = problem(UINT4, bias=True)
    layer, given = prepared(Int4Experts(), asked), rows(asked, [[0, 3], [3, -1]])
    first, second = ([part.tensors[name] for name in sorted(part.tensors)] for part in layer.parts)
    biases = layer.tensors["b13"], layer.tensors["b2"]
    operands = (*given, None, first, second, *biases, layer.meta["kind"])
    torch.library.opcheck(torch.ops.quantplug_cpu.experts.default, operands)


# -- memory ---------------------------------------------------------------------------------------------------------


@EACH
def test_a_layer_is_a_handful_of_tensors(kernel: StackedKernel, kind: WeightSpec) -> None:
    asked = problem(kind, bias=True)
    layer = prepared(kernel, asked)
    assert all(tensor.shape[0] == asked.experts for tensor in layer.named_tensors().values())
    assert len(layer.named_tensors()) <= 12


@EACH
def test_parts_that_somebody_made_anew_are_run_alike(kernel: StackedKernel, kind: WeightSpec) -> None:
    asked = problem(kind)
    layer, given = prepared(kernel, asked), rows(asked, [[0, 3], [3, 5]])
    plain = tuple(Prepared(p.layout_id, p.problem, dict(p.tensors), p.meta) for p in layer.parts)
    assert all(isinstance(part, Stack) for part in layer.parts)
    again = replace(layer, parts=plain)
    assert_bitwise_equal(kernel.apply(*given, again), kernel.apply(*given, layer))
    kernel.prepare(asked, experts(asked, 1), torch.device("cpu"), again)
    assert_bitwise_equal(kernel.apply(*given, layer), kernel.apply(*given, prepared(kernel, asked, 1)))


@pytest.mark.parametrize(("kernel", "kind"), [(Int4Experts(), INT4), (Int8Experts(), INT8), (W8A8Experts(), INT8)])
def test_every_expert_comes_back_bit_by_bit(kernel: StackedKernel, kind: WeightSpec) -> None:
    asked = problem(kind)
    layer = prepared(kernel, asked)
    for number, given in enumerate(experts(asked)):
        found = kernel.unprepare(layer, number)
        for one, other in zip((*found.w13, found.w2), (*given.w13, given.w2), strict=True):
            assert_bitwise_equal(one.codes, other.codes)
            assert_bitwise_equal(one.scales, other.scales)


def test_rounded_scales_have_no_way_back() -> None:
    layer = prepared(Int4Experts(), problem(UINT4))
    with pytest.raises(NotImplementedError, match=r"cpu\.int4 holds the scales of this layer rounded to bfloat16"):
        Int4Experts().unprepare(layer, 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda given: given[:5], "5 experts are given, not 6"),
        (lambda given: [], "0 experts are given, not 6"),
        (lambda given: [*given, given[0]], "more than 6 experts are given"),
        (lambda given: [*given[:3], replace(given[3], b2=None), *given[4:]], "expert 3: biases are missing"),
        (lambda given: [*given[:2], replace(given[2], w2=given[2].w13[0]), *given[3:]], "codes have 96 inputs, not 64"),
    ],
)
def test_experts_that_break_the_problem_are_refused(change, message: str) -> None:
    asked = problem(INT4, bias=True)
    with pytest.raises(ValueError, match=message):
        Int4Experts().prepare(asked, change(list(experts(asked))), torch.device("cpu"))


def test_biases_that_nobody_asked_for_are_refused() -> None:
    given = experts(problem(INT4, bias=True))
    with pytest.raises(ValueError, match="expert 0: biases are there"):
        Int4Experts().prepare(problem(INT4), given, torch.device("cpu"))


# -- verdicts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kernel", "asked", "code", "reason", "fix"),
    [
        (Int4Experts(), replace(problem(INT4), experts=0), "shape", "experts is 0", "at least 1"),
        (Int4Experts(), replace(problem(INT4), top_k=0), "shape", "top_k is 0", "at least 1"),
        (
            DenseExperts(),
            replace(problem(FP8), router_weight_on_input=True),
            "shape",
            "top_k 2 with the router's weight on the input",
            "top_k 1",
        ),
        (
            Int4Experts(),
            replace(problem(INT4), w13=(INT4, UINT4)),
            "segments",
            "gate and up differ: int4 group 32 and uint4 group 32",
            "loop.cpu.int4 takes them apart",
        ),
        (
            Int4Experts(),
            problem(spec("uint4", 32, act_order=True)),
            "act_order",
            "every expert has an order of its own: uint4 group 32 act-order",
            "loop.cpu.int4 takes it",
        ),
        (
            Int4Experts(),
            replace(problem(INT4), w2=spec("int8", 32)),
            "element",
            "down: int8 has 8 bits",
            "cpu.moe.int8 takes it",
        ),
        (
            Int8Experts(),
            problem(FP8),
            "element",
            "gate and up: float8_e4m3fn codes are floating-point numbers",
            "cpu.moe.dense takes them",
        ),
        (
            W8A8Experts(),
            replace(problem(INT8), activation=replace(PER_TOKEN, granularity="tensor", dynamic=False)),
            "activation",
            "x as int8 per tensor, static",
            "int8 per token, dynamic; loop.cpu.w8a8 takes it",
        ),
        (
            DenseExperts(),
            replace(problem(FP8), dtype="float64"),
            "dtype",
            "gate and up: activation dtype float64",
            "use",
        ),
    ],
)
def test_refusals_say_what_does_not_fit_and_what_would(
    kernel: StackedKernel, asked: MoEProblem, code: str, reason: str, fix: str
) -> None:
    refusal = kernel.supports(asked, CPU)
    assert isinstance(refusal, Rejected)
    assert (refusal.code, refusal.reason, refusal.fix[: len(fix)]) == (code, reason, fix)


def test_other_platforms_are_refused() -> None:
    refusal = Int4Experts().supports(problem(INT4), Platform.parse("cuda:9.0"))
    assert refusal == Rejected("platform", "runs on cpu, not on cuda:9.0")


@EACH
def test_what_is_rounded_is_that_of_both_products_and_between(kernel: StackedKernel, kind: WeightSpec) -> None:
    asked = problem(kind, bias=True)
    verdict = kernel.supports(asked, CPU)
    linear = [kernel.linear.supports(part, CPU) for part in (asked.first, asked.second)]
    assert isinstance(verdict, Accepted)
    assert {*verdict.casts} == {
        *(cast for each in linear if isinstance(each, Accepted) for cast in each.casts),
        Cast("gate_up", "bfloat16"),
        Cast("expert", "bfloat16"),
    }
    assert verdict.quantizes_x == (kernel.name == "cpu.moe.w8a8")


@EACH
@pytest.mark.parametrize("top_k", [1, 8])
def test_experts_are_cheaper_in_stacks_than_in_the_loop(kernel: StackedKernel, kind: WeightSpec, top_k: int) -> None:
    asked = problem(kind, top_k=top_k, experts=64)
    stacked, looped = kernel.supports(asked, CPU), LoopKernel(kernel.linear).supports(asked, CPU)
    assert isinstance(stacked, Accepted)
    assert isinstance(looped, Accepted)
    assert stacked.cost.at(1) < looped.cost.at(1)


def test_a_call_costs_what_its_active_experts_cost() -> None:
    """Those that are held do not count until there are rows for all of them, and then it is rows that count."""

    def cost(experts: int, rows: int) -> float:
        verdict = Int4Experts().supports(problem(INT4, top_k=2, experts=experts), CPU)
        assert isinstance(verdict, Accepted)
        return verdict.cost.at(rows)

    assert cost(64, 1) == cost(128, 1)
    assert cost(64, 8) < 8 * cost(64, 1)
    assert cost(64, 256) < 0.6 * cost(128, 256)
    assert cost(64, 1 << 20) < cost(128, 1 << 20) < 1.05 * cost(64, 1 << 20)
