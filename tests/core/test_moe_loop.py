"""The loop over experts: the conformance class over three kernels for linear layers, and what is the loop's own."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import numpy as np
import pytest
import torch

from quantplug.expertfunction import between
from quantplug.expertweights import ExpertWeights
from quantplug.kernel import Accepted, Cast, Cost, Rejected, Traits
from quantplug.moe import ExpertFunction, MoEProblem
from quantplug.moeloop import LoopKernel
from quantplug.platform import Platform
from quantplug.reference import ReferenceKernel
from quantplug.spec import ActivationSpec, ElementType, PerChannel, PerGroup, WeightSpec
from quantplug_testkit.bounds import stored_error
from quantplug_testkit.canonical import to_float64
from quantplug_testkit.compare import assert_within
from quantplug_testkit.conformance.experts import EXPERT_CATALOGUE, MoEKernelConformance
from quantplug_testkit.expertbounds import function_error
from quantplug_testkit.oracles.experts import Function, apply_function
from quantplug_testkit.quantizing import QuantizingKernel

if TYPE_CHECKING:
    from quantplug.kernel import Verdict
    from quantplug.spec import LinearProblem

CPU = Platform.parse("cpu")
INT8 = WeightSpec(ElementType.INT8, PerChannel(), "float32")
PROBLEM = MoEProblem(4, 2, 64, 32, (INT8, INT8), INT8, ExpertFunction(), "bfloat16")


class Picky(ReferenceKernel):
    """Takes segments of one contract of integers only, in bfloat16, and names a cast."""

    name = "picky"
    layout_id = "picky"
    traits = Traits(uniform_segments=True, deterministic=False)

    def supports(self, problem: LinearProblem, platform: Platform) -> Verdict:
        if not problem.uniform:
            return Rejected("segments", f"segments are {problem.segments[0].weight.describe()} and others")
        if problem.dtype != "bfloat16":
            return Rejected("dtype", f"activation dtype {problem.dtype}")
        if problem.segments[0].weight.element.floating:
            return Rejected("element", f"{problem.segments[0].weight.element} codes")
        verdict = super().supports(problem, platform)
        return replace(verdict, casts=(Cast("weights", "float32"),)) if isinstance(verdict, Accepted) else verdict


class TestLoopOverReference(MoEKernelConformance):
    kernel = LoopKernel(ReferenceKernel())


class TestLoopOverQuantizing(MoEKernelConformance):
    kernel = LoopKernel(QuantizingKernel())


class TestLoopOverUniformSegments(MoEKernelConformance):
    kernel = LoopKernel(Picky())


def hazard(name: str):
    return next(each for each in EXPERT_CATALOGUE if each.name == name)


def test_the_loop_is_named_after_its_kernel_and_takes_its_traits_over() -> None:
    loop = LoopKernel(Picky())
    assert (loop.name, loop.layout_id) == ("loop.picky", "loop.picky")
    assert loop.traits == Traits(graph_safe=False, deterministic=False)
    assert LoopKernel(ReferenceKernel()).traits.fallback
    linear = ReferenceKernel()
    assert LoopKernel(linear) == LoopKernel(linear)
    assert LoopKernel(linear) != LoopKernel(Picky())
    assert len({LoopKernel(linear), LoopKernel(linear)}) == 1


def test_what_it_rounds_is_what_both_products_and_the_loop_round() -> None:
    verdict = LoopKernel(Picky()).supports(PROBLEM, CPU)
    assert isinstance(verdict, Accepted)
    declared = {(cast.what, cast.dtype) for cast in verdict.casts}
    assert declared == {("weights", "float32"), ("gate_up", "bfloat16"), ("expert", "bfloat16")}


def test_its_cost_is_that_of_the_experts_that_rows_choose() -> None:
    """A row pays for each of its experts; many rows for every expert once, and each for its own products."""
    loop = LoopKernel(ReferenceKernel())
    one, two = (loop.supports(replace(PROBLEM, top_k=top_k), CPU) for top_k in (1, 2))
    first = ReferenceKernel().supports(PROBLEM.first, CPU)
    assert isinstance(one, Accepted)
    assert isinstance(two, Accepted)
    assert isinstance(first, Accepted)
    assert one.cost.at(1) > first.cost.at(1)
    assert two.cost.at(1) == pytest.approx(2 * one.cost.at(1))
    assert two.cost.at(2) == pytest.approx(2 * two.cost.at(1))  # four choices of four experts
    row_us = two.cost.at(1001) - two.cost.at(1000)
    assert two.cost.at(1000) - 1000 * row_us == pytest.approx(4 * (one.cost.at(1) - row_us / 2))


@pytest.mark.parametrize(
    ("problem", "code", "names"),
    [
        (replace(PROBLEM, dtype="float64"), "dtype", "float64"),
        (replace(PROBLEM, router_weight_on_input=True), "shape", "top_k 2"),
        (replace(PROBLEM, top_k=0), "shape", "top_k is 0"),
        (replace(PROBLEM, experts=0), "shape", "experts is 0"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_it_cannot_run_it_refuses_with_the_number(problem: MoEProblem, code: str, names: str) -> None:
    verdict = LoopKernel(ReferenceKernel()).supports(problem, CPU)
    assert isinstance(verdict, Rejected)
    assert (verdict.code, names in verdict.reason) == (code, True)


def test_the_second_product_is_asked_about_too() -> None:
    """A kernel that takes the first product and refuses the second has refused."""

    class WideOnly(ReferenceKernel):
        def supports(self, problem: LinearProblem, platform: Platform) -> Verdict:
            if problem.in_features < 64:
                return Rejected("shape", f"in_features {problem.in_features}", "64")
            return super().supports(problem, platform)

    assert LoopKernel(WideOnly()).supports(PROBLEM, CPU) == Rejected("shape", "in_features 32", "64")


@pytest.mark.parametrize("wide", [True, False])
def test_x_is_quantized_for_both_products_or_for_none(wide: bool) -> None:
    """The verdict has one word for both; a plan that said either would be wrong for one of them."""

    class Half(ReferenceKernel):
        name = "half"

        def supports(self, problem: LinearProblem, platform: Platform) -> Verdict:
            return Accepted(Cost(1.0, 1.0), quantizes_x=(problem.in_features == 64) == wide)

    permitted = hazard("x-int8-bfloat16").problem
    verdict = LoopKernel(Half()).supports(permitted, CPU)
    assert isinstance(verdict, Rejected)
    assert verdict.code == "activation"
    assert ("half would quantize x alone to int8" in verdict.reason) == wide


def test_one_scale_for_all_of_x_has_no_meaning_for_experts() -> None:
    """A kernel that takes the scale of x at run time would take another one for every expert's rows."""

    class Whole(ReferenceKernel):
        name = "whole"

        def supports(self, problem: LinearProblem, platform: Platform) -> Verdict:
            return Accepted(Cost(1.0, 1.0), quantizes_x=True)

    def verdict(granularity: Literal["tensor", "token"], *, dynamic: bool) -> Verdict:
        spec = ActivationSpec(ElementType.INT8, granularity, dynamic=dynamic)
        return LoopKernel(Whole()).supports(replace(PROBLEM, activation=spec), CPU)

    refused = verdict("tensor", dynamic=True)
    assert isinstance(refused, Rejected)
    assert refused.code == "activation"
    assert isinstance(verdict("tensor", dynamic=False), Accepted)
    assert isinstance(verdict("token", dynamic=True), Accepted)


def test_projections_that_differ_become_calls_of_their_own() -> None:
    """Where a kernel needs uniform segments, gate and up are two products; else they are one."""
    differing = hazard("all-differ-bfloat16")
    counts = {}
    for linear in (ReferenceKernel(), Picky()):
        experts = [differing.expert(number) for number in range(differing.problem.experts)]
        prepared = LoopKernel(linear).prepare(differing.problem, experts, torch.device("cpu"))
        counts[linear.name] = len(prepared.parts)
    assert counts == {"reference": 4 * 2, "picky": 4 * 3}


def test_only_the_experts_that_have_rows_are_run() -> None:
    """Weights of others are not even read."""
    layer = hazard("int4-bfloat16")
    loop = LoopKernel(ReferenceKernel())
    prepared = loop.prepare(layer.problem, [layer.expert(n) for n in range(4)], torch.device("cpu"))
    x, ids = layer.inputs(2), torch.tensor([[2, -1], [2, 9]])
    expected = loop.apply(x, torch.ones(2, 2), ids, prepared)
    for part in (*prepared.parts[:4], *prepared.parts[6:]):
        for name, tensor in part.tensors.items():
            if name.startswith("scales"):
                tensor.fill_(torch.nan)
    assert torch.equal(loop.apply(x, torch.ones(2, 2), ids, prepared), expected)


def test_a_row_is_added_once_for_each_expert_it_names() -> None:
    """Weights of a repeated id are added up first: 0.5 and 0.25 are 0.75, to the bit."""
    layer = hazard("int8-float32")
    loop = LoopKernel(ReferenceKernel())
    prepared = loop.prepare(layer.problem, [layer.expert(n) for n in range(4)], torch.device("cpu"))
    x = layer.inputs(3)
    twice = loop.apply(x, torch.tensor([[0.5, 0.25]] * 3), torch.tensor([[1, 1]] * 3), prepared)
    once = loop.apply(x, torch.tensor([[0.75, 9.0]] * 3), torch.tensor([[1, -1]] * 3), prepared)
    assert torch.equal(twice, once)


def test_biases_are_kept_in_the_problems_dtype() -> None:
    layer = hazard("bias-float16")
    experts = [layer.expert(number) for number in range(4)]
    given = [ExpertWeights(e.w13, e.w2, tuple(b.float() for b in e.b13), e.b2.float()) for e in experts]
    prepared = LoopKernel(ReferenceKernel()).prepare(layer.problem, given, torch.device("cpu"))
    assert {name: (tuple(t.shape), t.dtype) for name, t in prepared.tensors.items()} == {
        "b13": ((4, 64), torch.float16),
        "b2": ((4, 64), torch.float16),
    }


@pytest.mark.parametrize("name", ["silu", "gelu", "gelu_tanh", "relu", "relu2"])
@pytest.mark.parametrize("gated", [True, False])
def test_the_function_is_what_its_definition_says(name, gated) -> None:
    """In float32, within what `expertbounds` derives for a product that is known exactly."""
    product = torch.linspace(-9, 9, 74).reshape(1, -1)
    found = between(product, ExpertFunction(name, gated=gated, limit=5.0 if gated else None, alpha=1.5, up_offset=0.5))
    plain = Function(name, gated, 5.0 if gated else None, 1.5, 0.5)
    given = to_float64(product)
    exact = apply_function(given, plain)
    bound = stored_error(exact, function_error(given, np.zeros_like(given), plain), "float32")
    assert_within(found, exact, bound, name)


def test_the_function_rounds_once_to_the_dtype_of_the_product() -> None:
    product = torch.linspace(-3, 3, 64).reshape(2, 32).bfloat16()
    rounded = between(product, ExpertFunction())
    assert rounded.dtype == torch.bfloat16
    assert torch.equal(rounded, between(product.float(), ExpertFunction()).bfloat16())


def test_a_format_of_groups_is_looped_over_as_one_of_channels_is() -> None:
    """`supports` asks about the products of an expert as linear layers: N is I for each of gate and up, then H."""
    asked = []

    class Listening(ReferenceKernel):
        def supports(self, problem: LinearProblem, platform: Platform) -> Verdict:
            asked.append((problem.in_features, problem.out_features, len(problem.segments)))
            return super().supports(problem, platform)

    grouped = WeightSpec(ElementType.UINT4, PerGroup(32))
    LoopKernel(Listening()).supports(replace(PROBLEM, w13=(grouped, grouped), w2=grouped), CPU)
    assert asked == [(64, 64, 2), (32, 64, 1)]
