"""
The Triton kernel for experts on the catalogue of layers, element by element, through the interpreter.

On a machine with a GPU tests/device does the same, and more, on the GPU.
"""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch

from quantplug.expertweights import ExpertWeights
from quantplug.kernel import Accepted
from quantplug.platform import Platform
from quantplug_testkit.canonical import weight_tensors
from quantplug_testkit.compare import assert_bitwise_equal
from quantplug_testkit.conformance.experts import EXPERT_CATALOGUE, ExpertHazard
from quantplug_testkit.conformance.experts.case import ExpertCase
from quantplug_testkit.conformance.experts.hazard import family
from quantplug_testkit.conformance.experts.routing import scatter
from quantplug_testkit.conformance.hazard import weight
from quantplug_triton.experts import TritonExperts

pytest.importorskip("triton", reason="triton is installed on Linux only")
from quantplug_triton.expertlaunch import cut  # needs triton

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("Triton compiles for the GPU here: see tests/device", allow_module_level=True)

KERNEL = TritonExperts()
GPU = Platform.parse("cuda:9.0")
CPU = torch.device("cpu")


def families() -> dict[str, ExpertHazard]:
    """Return each accepted family in one dtype, in turns; x is quantized by no hazard, so that those would be twins."""
    found: dict[str, list[ExpertHazard]] = {}
    for hazard in EXPERT_CATALOGUE:
        if hazard.problem.activation is None and isinstance(KERNEL.supports(hazard.problem, GPU), Accepted):
            found.setdefault(hazard.family, []).append(hazard)
    return {name: dtypes[turn % len(dtypes)] for turn, (name, dtypes) in enumerate(found.items())}


FAMILIES = families()
FORMATS = ("int4", "uint2", "uint3", "int8-one-scale", "float8-blocks-ragged", "mxfp4", "nvfp4", "act-order",
           "act-order-bias", "short-last-groups", "odd-h-and-i-bias", "no-gate-bias")  # fmt: skip
"""What differs in how it is laid out."""

SOME = ("uint4", "act-order-bias", "all-of-three")


def prepared(name: str) -> ExpertCase:
    return ExpertCase(KERNEL, GPU, CPU, FAMILIES[name])


@pytest.mark.parametrize("name", FAMILIES)
def test_every_element_is_within_the_derived_bound(name):
    case = prepared(name)
    for rows, kind in ((1, "spread"), (5, "mixed")):
        x, routing = case.inputs(rows), case.route(rows, kind)
        case.check(x, routing, case.apply(x, routing), f"{rows} rows, {kind}")


def test_gate_and_up_have_an_order_and_a_global_scale_each():
    """No format of today has both; the catalogue has each by itself."""
    hazard = family("both", weight("uint4", 32, act_order=True, global_scale=True))[0]
    case = ExpertCase(KERNEL, GPU, CPU, hazard)
    x, routing = case.inputs(2), case.route(2, "spread")
    case.check(x, routing, case.apply(x, routing), "2 rows")


@pytest.mark.parametrize("name", SOME)
def test_every_routing_is_within_the_derived_bound(name):
    case = prepared(name)
    for rows, kind in ((70, "one-expert"), (17, "idle-ends"), (17, "repeated"), (9, "nowhere"), (70, "spread")):
        x, routing = case.inputs(rows), case.route(rows, kind)
        case.check(x, routing, case.apply(x, routing), f"{rows} rows, {kind}")


@pytest.mark.parametrize("name", SOME)
def test_a_map_says_which_experts_are_here(name):
    case = prepared(name)
    x = case.inputs(9)
    for dtype in (torch.int64, torch.int32):
        routing = scatter(case.hazard, case.route(9)).with_ids(dtype)
        case.check(x, routing, case.apply(x, routing), f"ids and a map in {dtype}")


def test_no_rows_give_no_rows():
    case = prepared("int4")
    case.apply(case.inputs(0), case.route(0))


def test_padding_hides_what_x_and_weights_hold():
    case = prepared("bias")
    x, routing = case.inputs(6), case.route(6, "spread")
    clean = x.clone()
    clean[::2] = 0
    for holder, value in ((x, torch.nan), (routing.weights, torch.inf), (routing.ids, -1)):
        holder[::2] = value
    y = case.apply(x, routing)
    assert torch.equal(y[::2], torch.zeros_like(y[::2]))
    case.check(clean, routing, y, "y beside padded rows")


def test_many_choices_are_put_in_order_in_several_goes():
    case = prepared("one-between")
    x, routing = case.inputs(600), case.route(600)
    case.check(x, routing, case.apply(x, routing), "1200 choices")


def test_strided_operands_are_read_where_they_lie():
    case = prepared("int8")
    x, routing = case.inputs(6), case.route(6)
    wide = torch.full((6, 2 * x.shape[1]), torch.nan, dtype=x.dtype)
    wide[:, ::2] = x
    expected = case.apply(x, routing)
    assert torch.equal(case.apply(wide[:, ::2], routing), expected)
    turned = replace(routing, weights=routing.weights.t().contiguous().t(), ids=routing.ids.t().contiguous().t())
    assert torch.equal(case.apply(x, turned), expected)


def test_the_compiler_sees_one_operator():
    case = prepared("act-order-bias")
    x, routing, made = case.inputs(3), case.route(3), case.prepared

    def call(x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return KERNEL.apply(x, weights, ids, made)

    torch.compiler.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, routing.weights, routing.ids), case.apply(x, routing))


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("experts", [1, 5, 128])
def test_there_are_blocks_enough_for_any_routing(experts, wide):
    generator = torch.Generator().manual_seed(experts)
    for choices in (1, 8, 129, 5000):
        plan = cut(choices, experts, 2048, 12, 132, wide=wide)
        for most in (1, 2, experts):
            ids = torch.randint(0, min(most, experts), (choices,), generator=generator)
            needed = -(-torch.bincount(ids) // plan.block_m)
            assert int(needed.sum()) <= plan.blocks
        assert plan.blocks <= min(choices, experts) + choices // plan.block_m


def test_few_rows_share_the_work_of_the_second_product_as_some_layers_of_the_catalogue_do():
    problem = FAMILIES["tiles-nvfp4"].problem
    assert cut(problem.top_k, problem.experts, problem.hidden, problem.intermediate // 32, 8, wide=False).shares == 2
    assert cut(problem.top_k * 600, problem.experts, problem.hidden, 4, 8, wide=False).shares == 1


@pytest.mark.parametrize("name", FORMATS)
def test_the_way_back_gives_every_bit_again(name):
    case = prepared(name)
    for number in range(case.hazard.problem.experts):
        found, given = KERNEL.unprepare(case.prepared, number), case.hazard.expert(number)
        for one, other in zip((*found.w13, found.w2), (*given.w13, given.w2), strict=True):
            ours, theirs = weight_tensors(one), weight_tensors(other)
            assert one.spec == other.spec
            assert ours.keys() == theirs.keys()
            for key, tensor in theirs.items():
                assert_bitwise_equal(ours[key].contiguous(), tensor.contiguous(), f"{key} of expert {number}")


def test_a_float64_scale_has_no_way_back():
    case = prepared("float8")
    experts = list(case.experts())
    w2 = experts[-1].w2
    experts[-1] = replace(experts[-1], w2=replace(w2, scales=w2.scales.to(torch.float64)))
    made = KERNEL.prepare(case.hazard.problem, experts, CPU)
    with pytest.raises(NotImplementedError, match="float64"):
        KERNEL.unprepare(made, 0)


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_held_is_no_more_than_is_declared(name):
    """The file's own bytes, and those that the verdict declares beside them."""
    case = prepared(name)
    entitled = 0
    for expert in case.experts():
        tensors = [*expert.b13, *([] if expert.b2 is None else [expert.b2])]
        for part in (*expert.w13, expert.w2):
            entitled += -(-part.codes.numel() * part.spec.element.bits // 8)
            tensors += [t for t in (part.scales, part.zeros, part.g_idx, part.global_scale) if t is not None]
        entitled += sum(tensor.nbytes for tensor in tensors)
    assert case.prepared.nbytes <= entitled + case.extra_bytes


@pytest.mark.parametrize("name", ["uint4", "act-order-bias", "nvfp4", "short-last-groups"])
def test_a_second_preparation_writes_into_the_same_memory(name):
    case = prepared(name)
    places = {key: tensor.data_ptr() for key, tensor in case.prepared.tensors.items()}
    again = case.prepare(seed=1, out=case.prepared)
    assert {key: tensor.data_ptr() for key, tensor in again.tensors.items()} == places
    for key, tensor in case.prepare(seed=1).tensors.items():
        assert_bitwise_equal(again.tensors[key], tensor, key)


class TestGroupsOfUnequalSize:
    """A shard of an act-order layer: groups are the whole layer's, and have as many inputs as fall to the shard."""

    def experts(self, case: ExpertCase) -> list[ExpertWeights]:
        """Every expert has a group that is larger than the one before had."""
        made = []
        for number, expert in enumerate(case.experts()):
            g_idx = torch.arange(case.hazard.problem.hidden, dtype=torch.int32) % 2
            g_idx[: 12 * number] = 0
            made.append(replace(expert, w13=tuple(replace(part, g_idx=g_idx) for part in expert.w13)))
        return made

    def test_earlier_experts_are_laid_out_anew(self):
        case = prepared("act-order")
        experts = self.experts(case)
        made = KERNEL.prepare(case.hazard.problem, experts, CPU)
        for number, expert in enumerate(experts):
            found = KERNEL.unprepare(made, number)
            for one, other in zip(found.w13, expert.w13, strict=True):
                for key, tensor in weight_tensors(other).items():
                    assert_bitwise_equal(weight_tensors(one)[key].contiguous(), tensor.contiguous(), key)
        values, _ = KERNEL.dequantize(made, 3)
        x, routing = case.inputs(2), case.route(2, "one-expert")
        case.prepared = made
        y = case.apply(x, routing).to(torch.float64)
        gate, up = (x.to(torch.float64) @ values.to(torch.float64).t()).chunk(2, 1)
        inner = torch.nn.functional.silu(gate) * up
        weights = torch.where(routing.ids == 3, routing.weights, 0).sum(1, keepdim=True)
        exact = weights * (inner @ experts[3].w2.dequantize(torch.float64).t())
        assert float((y - exact).norm() / exact.norm()) < 2**-8

    def test_memory_that_is_kept_cannot_grow(self):
        case = prepared("act-order")
        with pytest.raises(ValueError, match="a group of act-order has"):
            KERNEL.prepare(case.hazard.problem, self.experts(case), CPU, out=case.prepared)


@pytest.mark.parametrize(("count", "words"), [(3, "3 experts are given, not 4"), (5, "more than 4 experts")])
def test_another_number_of_experts_is_an_error(count, words):
    case = prepared("int4")
    with pytest.raises(ValueError, match=words):
        KERNEL.prepare(case.hazard.problem, [case.hazard.expert(number) for number in range(count)], CPU)


@pytest.mark.parametrize(("name", "words"), [("bias", "missing"), ("int4", "there")])
def test_biases_are_there_or_not_as_the_problem_says(name, words):
    case = prepared(name)
    problem = replace(case.hazard.problem, bias=not case.hazard.problem.bias)
    missing = "there" if words == "missing" else "missing"
    with pytest.raises(ValueError, match=missing):
        KERNEL.prepare(problem, case.experts(), CPU)
