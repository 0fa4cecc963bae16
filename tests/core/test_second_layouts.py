"""A second copy of weights within a budget: who gets one, what runs, and what the plan says of it."""

from __future__ import annotations

import copy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from toy_checkpoints import toy_checkpoint
from toy_experts import HIDDEN, container, toy_moe, write_moe

from quantplug import dispatch
from quantplug.draft import Draft
from quantplug.errors import LoadError
from quantplug.hooks import hookimpl
from quantplug.inventory import ModuleInfo
from quantplug.kernel import Accepted, Cost, Traits
from quantplug.load import load_layers
from quantplug.plan import Choice, Plan
from quantplug.planner import plan
from quantplug.platform import Platform
from quantplug.plugins import build_registry
from quantplug.policy import Policy
from quantplug.secondlayout import second_layout
from quantplug.select import select
from quantplug.spec import ElementType, LinearProblem, PerChannel, PerGroup, SegmentSpec, WeightSpec
from quantplug.timings import Measurement, Timings, problem_key, versions_of
from quantplug.writeback import stored_tensors
from quantplug_testkit import toys

Q, UP, DOWN = (f"model.layers.0.{name}" for name in ("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj"))
WIDER = 7


class Few(toys.ToyKernel):
    """Adds 1, so that one sees who ran; holds some bytes more."""

    name = "a.few"
    layout_id = "a"

    def supports(self, problem, platform):
        return Accepted(Cost(5.0, 2.0), extra_bytes=WIDER, dequantize_us=toys.SLOW_US)

    def apply(self, x, prepared, bias):
        assert prepared.layout_id == self.layout_id
        return super().apply(x, prepared, bias) + 1


class Many(toys.ToyKernel):
    """Another layout, the best for all rows taken together; few rows of wide layers are what it is slowest at."""

    name = "b.many"
    layout_id = "b"

    def supports(self, problem, platform):
        return Accepted(Cost(20.0 if problem.in_features > 32 else 12.0, 0.5), dequantize_us=toys.SLOW_US)

    def prepare(self, problem, segments, activation, device, out=None):
        made = super().prepare(problem, [replace(s, scales=s.scales * 2) for s in segments], activation, device, out)
        return replace(made, layout_id=self.layout_id)

    def apply(self, x, prepared, bias):
        assert prepared.layout_id == self.layout_id
        return super().apply(x, prepared, bias)


class Close(Many):
    """Gains 4 % for many rows."""

    name = "c.close"
    layout_id = "c"

    def supports(self, problem, platform):
        return Accepted(Cost(5.4, 1.92), dequantize_us=toys.SLOW_US)


class Whole(Many):
    """Takes layers whose segments differ as they are, where the first wants them one by one."""

    name = "d.whole"
    layout_id = "d"
    traits = Traits(uniform_segments=False)


def registry_of(*kernels):
    @hookimpl
    def quantplug_kernels():
        return [kernel() for kernel in kernels]

    plugin = {name: getattr(toys, name) for name in ("quantplug_api", "quantplug_schemes", "quantplug_dialects")}
    return build_registry({"toys": SimpleNamespace(**plugin, quantplug_kernels=quantplug_kernels)})


@pytest.fixture
def directory(tmp_path):
    return toy_checkpoint(tmp_path)


def planned(directory, budget, *kernels, rules=()):
    policy = replace(Policy.parse({"rule": list(rules)}, "test"), layout_budget=budget)
    return plan(directory, platform="cpu", registry=registry_of(*(kernels or (Few, Many))), policy=policy)


def layouts(made, path):
    return made.decision_of(made.layer(path)).layouts


def test_without_a_budget_a_layer_has_one_layout(directory):
    made = planned(directory, 0)
    assert {decision.layouts for decision in made.decisions} == {("b",)}
    assert {decision.extra_bytes for decision in made.decisions} == {0}


def test_with_one_the_plan_says_who_reads_what_and_what_it_costs(directory):
    before, made = planned(directory, 0), planned(directory, 10**9)
    decision = made.decision_of(made.layer(DOWN))
    # 5 + 2 M against 20 + M / 2: the lines cross at M = 10.
    assert decision.choices == (Choice("a.few", "a", 0, 15), Choice("b.many", "b", 16, None))
    assert decision.extra_bytes == made.layer(DOWN).problem.stored_bytes + WIDER
    for layer, one in zip(made.layers, before.layers, strict=True):
        second = made.decision_of(layer)
        assert layer.memory_bytes - one.memory_bytes == (0 if second is None else second.extra_bytes)
    assert made.hash != before.hash
    assert Plan.from_json(made.to_json()) == made


def test_who_gains_most_comes_first_and_layers_alike_share_a_fate(directory):
    whole = planned(directory, 10**9)
    one = whole.decision_of(whole.layer(DOWN)).extra_bytes
    enough, lacking = planned(directory, 2 * one), planned(directory, 2 * one - 1)
    assert layouts(enough, DOWN) == ("a", "b")
    assert layouts(enough, "model.layers.1.mlp.down_proj") == ("a", "b")
    assert layouts(enough, UP) == layouts(enough, Q) == ("b",)
    assert layouts(lacking, DOWN) == ("b",)
    spent = [lacking.decision_of(layer).extra_bytes for layer in lacking.layers if layer.decision is not None]
    assert 0 < sum(spent) <= 2 * one - 1  # what does not fit leaves room for what does


def test_a_gain_within_what_estimates_are_wrong_by_is_none(directory):
    assert layouts(planned(directory, 10**9, Few, Close), DOWN) == ("c",)
    assert layouts(planned(directory, 10**9, Few, Close, Many), DOWN) == ("a", "b")


def test_the_best_pair_need_not_have_the_best_alone(directory):
    """Of 5 + 1.2 M, 20 + 0.4 M and 200 + 0.1 M the second is best on average, the first and the third together."""

    def kernel(letter, base, per_row):
        class Kernel(Few):
            name, layout_id = f"{letter}.kernel", letter

            def supports(self, problem, platform):
                return Accepted(Cost(base, per_row), dequantize_us=toys.SLOW_US)

        return Kernel

    kernels = kernel("a", 5.0, 1.2), kernel("b", 20.0, 0.4), kernel("c", 200.0, 0.1)
    assert layouts(planned(directory, 0, *kernels), DOWN) == ("b",)
    assert layouts(planned(directory, 10**9, *kernels), DOWN) == ("a", "c")


class LessSlow(Few):
    """As fast for few rows, and less slow for many, which are Many's in either pair."""

    name = "e.few"
    layout_id = "e"

    def supports(self, problem, platform):
        return Accepted(Cost(5.0, 2.0, many=Cost(40.0, 0.6)), extra_bytes=WIDER, dequantize_us=toys.SLOW_US)


def test_of_pairs_that_gain_and_hold_the_same_the_one_with_the_better_layouts_is_taken(directory):
    made = planned(directory, 10**9, Few, Many, LessSlow)
    decision = made.decision_of(made.layer(DOWN))
    assert decision.choices == (Choice("e.few", "e", 0, 15), Choice("b.many", "b", 16, None))


def test_two_layouts_that_lose_more_than_they_gain_are_not_offered():
    """At 6 rows `a` gains, which no bucket shows; with `c` it would serve 100 rows, too, in four times the time."""

    def kernel(letter, cost):
        class Kernel(Few):
            name, layout_id = f"{letter}.kernel", letter

            def supports(self, problem, platform):
                return Accepted(cost, dequantize_us=toys.SLOW_US)

        return Kernel

    registry = registry_of(
        kernel("a", Cost(19.0, 5.5)), kernel("b", Cost(0.0, 10.0, Cost(54.0, 1.0))), kernel("c", Cost(1000.0, 0.01))
    )
    platform, rows = Platform.parse("cpu"), (6, 100)
    problem = LinearProblem(64, (SegmentSpec(32, WeightSpec(ElementType.INT8, PerChannel(), "float32")),), "bfloat16")
    decision = select(problem, ModuleInfo("layer", "linear"), platform, registry, Policy(rows=rows), {})
    assert decision.layouts == ("b",)
    assert second_layout(problem, decision, platform, registry, rows) is None


def test_a_kernel_that_is_only_allowed_competes_like_any_other(directory):
    wished, plain = planned(directory, 10**9, rules=[{"allow": "*"}]), planned(directory, 10**9)
    assert [decision.choices for decision in wished.decisions] == [decision.choices for decision in plain.decisions]
    assert layouts(wished, DOWN) == ("a", "b")


def test_only_the_rows_that_count_are_paid_for(directory):
    registry, decode = registry_of(Few, Many), Policy(layout_budget=10**9, rows=(1, 8))
    made = plan(directory, platform="cpu", registry=registry, policy=decode)
    assert layouts(made, DOWN) == ("a",)


@pytest.mark.parametrize("rule", [{"pin": "a.few"}, {"prefer": "a.few"}, {"deny": "b.many"}])
def test_a_policy_that_decides_about_kernels_is_obeyed(directory, rule):
    assert layouts(planned(directory, 10**9, rules=[rule]), DOWN) == ("a",)


def test_kernels_that_would_cut_a_layer_differently_do_not_share_it(directory):
    """One contract is taken whole by both; of a fused layer with two, one wants the segments one by one."""
    registry, platform, module = registry_of(Few, Whole), Platform.parse("cpu"), ModuleInfo(DOWN, "linear")
    int8 = SegmentSpec(48, WeightSpec(ElementType.INT8, PerChannel(), "float32"))
    int4 = SegmentSpec(16, WeightSpec(ElementType.INT4, PerGroup(16)))
    for segments, together in (((int8, int8), True), ((int8, int4), False)):
        problem = LinearProblem(64, segments, "bfloat16")
        decision = select(problem, module, platform, registry, Policy(), {})
        assert decision.layouts == ("d",)
        assert (second_layout(problem, decision, platform, registry) is not None) is together


def test_measured_times_decide_where_there_are_any():
    """By estimates the second pays from 16 rows on; measured, from 64 on, and one that was not measured never does."""
    here = Platform("cpu", "x86_64", device="Some CPU")
    registry, module = registry_of(Few, Many, Whole), ModuleInfo(DOWN, "linear")
    int8 = WeightSpec(ElementType.INT8, PerChannel(), "float32")
    problem = LinearProblem(48, (SegmentSpec(32, int8),), "bfloat16")
    versions = versions_of("toys", here, registry)
    times = {"a.few": ((1, 9.0), (16, 40.0), (64, 170.0)), "b.many": ((1, 60.0), (16, 60.0), (64, 90.0))}
    timings = Timings(
        Measurement(here.device, str(here), problem_key(problem), kernel, versions, us) for kernel, us in times.items()
    )
    decision = select(problem, module, here, registry, Policy(), {}, timings)
    second = second_layout(problem, decision, here, registry)
    assert decision.basis == second.decision.basis == "measured"
    assert second.decision.choices == (Choice("a.few", "a", 0, 63), Choice("b.many", "b", 64, None))


def test_a_draft_has_what_its_target_left(directory):
    policy, registry = Policy(layout_budget=10**9), registry_of(Few, Many)
    alone = plan(directory, platform="cpu", registry=registry, policy=policy)
    needed = sum(alone.decision_of(layer).extra_bytes for layer in alone.layers if layer.decision is not None)
    for budget, layouts_of_draft in ((needed, {("b",)}), (2 * needed, {("a", "b")})):
        both = plan(
            directory, platform="cpu", registry=registry, policy=Policy(layout_budget=budget), draft=Draft(directory)
        )
        assert {decision.layouts for decision in both.decisions} == {("a", "b")}
        assert {decision.layouts for decision in both.draft.decisions} == layouts_of_draft


@pytest.fixture
def layer(directory):
    made = planned(directory, 10**9)
    return load_layers(made, directory, registry=registry_of(Few, Many)).modules[DOWN]


def inputs(rows):
    return torch.randn(rows, 48, generator=torch.Generator().manual_seed(rows)).bfloat16()


def expected(layer, x):
    values = layer.dequantize(torch.float32)
    y = x.float() @ values.T
    return y + 1 if len(x) <= 15 else y * 2


@pytest.mark.parametrize("rows", [0, 1, 15, 16, 300])
def test_each_kernel_reads_its_own_layout(layer, rows):
    x = inputs(rows)
    # y is rounded once; that of few rows is y + 1, rounded again: 2^-8 (|y| + |y + 1|) with |y| <= |y + 1| + 1. What
    # that leaves out (a rounding's own, and float32 sums of 48 products) is below 2^-13.
    wanted = expected(layer, x)
    assert bool(((layer(x).float() - wanted).abs() <= (2**-8 * (2 * wanted.abs() + 1)) * (1 + 2**-5)).all())


def test_one_graph_serves_both(layer):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(layer, backend=backend, fullgraph=True, dynamic=True)
    for rows in (2, 15, 16, 300, 3):
        assert torch.equal(compiled(inputs(rows)), layer(inputs(rows))), rows
    assert len(graphs) == 1


def test_the_operator_knows_both(layer):
    [(bias, tensors, call)] = layer._calls
    for rows in (0, 3, 20):
        assert torch.equal(dispatch.run(inputs(rows), bias, tensors, call), layer(inputs(rows)))
        torch.library.opcheck(dispatch.run, (inputs(rows).requires_grad_(), bias, tensors, call))


def test_a_copy_and_a_reload_hold_both(layer, directory):
    twin = copy.deepcopy(layer)
    addresses = {name: buffer.data_ptr() for name, buffer in layer.named_buffers()}
    assert len(list(layer.named_buffers(remove_duplicate=False))) == 4  # codes and scales, twice
    before = layer(inputs(40))
    stored = {name.rpartition(".")[2]: tensor.clone() for name, tensor in layer.encode().items()}
    for buffer in layer.buffers():
        buffer.zero_()
    assert torch.equal(twin(inputs(40)), before)
    layer.install([stored], [])
    assert {name: buffer.data_ptr() for name, buffer in layer.named_buffers()} == addresses
    assert torch.equal(layer(inputs(40)), before)
    assert torch.equal(layer(inputs(4)), twin(inputs(4)))


def test_the_way_back_is_the_first_kernels(layer):
    stored = layer.encode()
    assert {name.rpartition(".")[2] for name in stored} == {"codes", "scale"}
    twice = {name: tensor.clone() for name, tensor in stored.items()}
    assert all(torch.equal(layer.encode()[name], tensor) for name, tensor in twice.items())


def test_who_fails_to_prepare_the_second_is_named(directory):
    class Broken(Many):
        name = "b.broken"

        def prepare(self, problem, segments, activation, device, out=None):
            raise ValueError("no room")

    made = planned(directory, 10**9, Few, Broken)
    with pytest.raises(LoadError) as raised:
        load_layers(made, directory, registry=registry_of(Few, Broken))
    assert raised.value.code == "QP-LOAD-PREPARE"
    assert "b.broken" in str(raised.value)


def test_experts_are_read_once_for_each_layout(tmp_path):
    directory = write_moe(tmp_path / "moe", toy_moe())
    registry = registry_of(Few, Many)

    def load(policy):
        made = plan(directory, platform="cpu", registry=registry, policy=policy)
        return made, load_layers(
            made, directory, registry=registry, progress=lambda _, done, total: told.append((done, total))
        )

    told: list[tuple[int, int]] = []
    made, result = load(Policy(layout_budget=10**9))
    decision = made.decision_of(made.layer(container(0)))
    assert decision.layouts == ("loop.a", "loop.b")
    assert told[-1][0] == told[-1][1]
    singles = [load(Policy.parse({"rule": [{"pin": name}]}, "test"))[1] for name in ("loop.a.few", "loop.b.many")]
    few, many = (single.experts[container(0)] for single in singles)
    both = result.experts[container(0)]
    first = decision.choices[0].max_rows
    for rows, alone in ((1, few), (first, few), (first + 1, many)):
        generator = torch.Generator().manual_seed(rows)
        x = torch.randn(rows, HIDDEN, generator=generator)
        weights, ids = torch.rand(rows, 4, generator=generator).topk(2)
        assert torch.equal(both(x, weights, ids), alone(x, weights, ids)), rows
    assert dict(stored_tensors(result.experts)).keys() == {name for name in toy_moe() if "experts" in name}
