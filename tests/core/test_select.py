"""Which kernel is chosen, and what is kept of the others' answers."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest
from toy_checkpoints import toy_registry

from quantplug.choices import ROW_BUCKETS
from quantplug.errors import PlanError
from quantplug.hooks import hookimpl
from quantplug.inventory import ModuleInfo
from quantplug.kernel import Accepted, Cost, LinearKernel, Rejected, Traits, Verdict
from quantplug.plan import Choice
from quantplug.planner import probe_kernels
from quantplug.platform import Platform
from quantplug.plugins import build_registry
from quantplug.policy import Policy
from quantplug.select import select
from quantplug.spec import ElementType, LinearProblem, PerChannel, PerGroup, SegmentSpec, WeightSpec
from quantplug_testkit import toys

if TYPE_CHECKING:
    from quantplug.registry import Registry

CPU = Platform.parse("cpu")
MODULE = ModuleInfo("model.layers.0.mlp.up_proj", "linear")
INT8 = SegmentSpec(48, WeightSpec(ElementType.INT8, PerChannel(), "float32"))
INT4 = SegmentSpec(16, WeightSpec(ElementType.INT4, PerGroup(16)))


def problem(in_features: int = 32, *segments: SegmentSpec) -> LinearProblem:
    return LinearProblem(in_features, segments or (INT8,), "bfloat16")


def policy(*rules: dict[str, object]) -> Policy:
    return Policy.parse({"rule": list(rules)}, "test policy")


def test_the_cheapest_on_average_comes_first_and_kernels_of_its_layout_share_the_rows() -> None:
    """At cost 5 + 2 M against 20 + M / 2 the lines cross at M = 10, so the bucket from 16 on is the other's."""
    decision = select(problem(), MODULE, CPU, toy_registry(), Policy(), {})
    assert decision.choices == (Choice("toy.fast", "toy", 0, 15), Choice("toy.many", "toy", 16, None))
    assert decision.layouts == ("toy",)
    assert [c.kernel for c in decision.candidates] == [
        "toy.many", "toy.fast", "toy.fast.dense", "toy.many.dense", "reference",
    ]  # fmt: skip


def vendor_of(*kernels: LinearKernel) -> Registry:
    @hookimpl
    def quantplug_kernels() -> list[object]:
        return list(kernels)

    return build_registry({"vendor": SimpleNamespace(quantplug_api=">=1,<2", quantplug_kernels=quantplug_kernels)})


def kernel_of(kernel: str, layout: str, cost: Cost, *, extra: int = 0) -> LinearKernel:
    class Kernel(toys.ToyKernel):
        name, layout_id = kernel, layout

        def supports(self, problem: LinearProblem, platform: Platform) -> Verdict:
            return Accepted(cost, extra_bytes=extra, dequantize_us=1e9)

    return Kernel()


def test_layouts_are_compared_by_the_mean_time_of_their_kernels_over_the_numbers_of_rows_that_count() -> None:
    """Alone neither of b's kernels is best: together they take 9 for one row (a takes 6), and a sixth of a for many."""
    registry = vendor_of(
        kernel_of("a.all", "a", Cost(5.0, 1.0)),
        kernel_of("b.few", "b", Cost(1.0, 8.0)),
        kernel_of("b.many", "b", Cost(20.0, 1 / 6)),
    )
    layouts = {
        rows: select(problem(), MODULE, CPU, registry, Policy(rows=rows), {}).layouts
        for rows in [ROW_BUCKETS, (1,), (1, 2), (1, 8192)]
    }
    assert layouts == {ROW_BUCKETS: ("b",), (1,): ("a",), (1, 2): ("a",), (1, 8192): ("b",)}
    decision = select(problem(), MODULE, CPU, registry, Policy(rows=(1, 8192)), {})
    assert decision.choices == (Choice("b.few", "b", 0, 3), Choice("b.many", "b", 4, None))


def test_by_estimates_too_a_layout_of_far_more_bytes_is_not_chosen_for_its_time_alone() -> None:
    stored = problem().stored_bytes
    for extra, chosen in ((stored // 2, "a.dense"), (stored // 2 + 1, "b.codes")):
        registry = vendor_of(
            kernel_of("a.dense", "a", Cost(1.0, 0.1), extra=extra), kernel_of("b.codes", "b", Cost(5.0, 1.0))
        )
        assert select(problem(), MODULE, CPU, registry, Policy(), {}).kernel == chosen


@pytest.mark.parametrize("cost", [Cost(0.0, 0.0), Cost(-1e9, 0.0)])
def test_who_claims_to_take_no_time_is_first_and_breaks_nothing(cost: Cost) -> None:
    registry = vendor_of(kernel_of("a.some", "a", Cost(5.0, 1.0)), kernel_of("b.none", "b", cost))
    assert select(problem(), MODULE, CPU, registry, Policy(), {}).kernel == "b.none"


def test_every_refusal_is_kept_with_its_reason() -> None:
    decision = select(problem(40), MODULE, CPU, toy_registry(), Policy(), {})
    assert decision.kernel == "reference"
    refused = {c.kernel: c.verdict for c in decision.candidates if isinstance(c.verdict, Rejected)}
    assert refused["toy.fast"] == Rejected("shape", "in_features 40 is not a multiple of 16", "pad K")


def test_a_probe_refusal_joins_the_trace_and_moves_the_choice() -> None:
    refusal = Rejected("probe", "the tiny product is wrong")
    decision = select(problem(), MODULE, CPU, toy_registry(), Policy(), {"toy.fast": refusal})
    assert decision.kernel == "toy.many"
    assert next(c.verdict for c in decision.candidates if c.kernel == "toy.fast") == refusal


def test_the_fallback_is_never_chosen_over_a_dearer_real_kernel() -> None:
    """The reference kernel's estimate for a tiny problem is below the toy's; it must still come last."""
    decision = select(problem(16, SegmentSpec(1, INT8.weight)), MODULE, CPU, toy_registry(), Policy(), {})
    assert decision.kernel == "toy.fast"


def test_prefer_deny_and_pin_act_on_the_layers_they_match() -> None:
    registry = toy_registry()
    prefer = policy({"match": "re:.*up_proj", "prefer": ["toy.many"]})
    assert select(problem(), MODULE, CPU, registry, prefer, {}).choices == (Choice("toy.many", "toy"),)
    other = ModuleInfo("model.layers.0.mlp.down_proj", "linear")
    assert select(problem(), other, CPU, registry, prefer, {}).kernel == "toy.fast"
    deny = select(problem(), MODULE, CPU, registry, policy({"deny": "toy.*"}), {})
    assert deny.kernel == "reference"
    assert deny.candidates[-1].verdict == Rejected("policy", "denied by test policy: rule 1")
    pin = select(problem(), MODULE, CPU, registry, policy({"match": "mlp", "pin": "reference"}), {})
    assert pin.choices == (Choice("reference", "canonical"),)


def test_what_gives_something_up_is_chosen_where_it_is_asked_for_by_name() -> None:
    """However cheap it is; a glob over names asks for none, and asking for it is asking for its loop over experts."""

    class Careless(toys.ToyKernel):
        name = "a.careless"
        layout_id = "careless"
        traits = Traits(by_request=True)

        def supports(self, problem: LinearProblem, platform: Platform) -> Verdict:
            return Accepted(Cost(0.1, 0.1))

    @hookimpl
    def quantplug_kernels() -> list[object]:
        return [Careless()]

    vendor = SimpleNamespace(quantplug_api=">=1,<2", quantplug_kernels=quantplug_kernels)
    registry = build_registry({"toys": toys, "vendor": vendor})
    assert "a.careless.dense" not in registry.kernels
    assert registry.moe_kernels["loop.a.careless"].item.traits.by_request
    refusal = Rejected("policy", "is chosen by request only", 'allow = ["a.careless"]')
    for wishes in ((), ({"prefer": "a.*"},), ({"match": "mlp.down_proj", "prefer": "a.careless"},)):
        decision = select(problem(), MODULE, CPU, registry, policy(*wishes), {})
        assert decision.kernel == "toy.fast"
        assert next(c.verdict for c in decision.candidates if c.kernel == "a.careless") == refusal
    for wish in ({"prefer": ["toy.many", "a.careless"]}, {"pin": "a.careless"}):
        assert select(problem(), MODULE, CPU, registry, policy(wish), {}).kernel == "a.careless"
    for allowed in ({"allow": "a.*"}, {"allow": "a.careless"}):
        decision = select(problem(), MODULE, CPU, registry, policy(allowed), {})
        assert decision.choices == (Choice("a.careless", "careless"),)
        assert decision.candidates[0].policy.startswith("allow (test policy")
    assert select(problem(), MODULE, CPU, registry, policy({"allow": "toy.*"}), {}).choices[1].kernel == "toy.many"
    assert policy({"prefer": "a.careless"}).asks_for(MODULE, "loop.a.careless")
    assert not policy({"deny": "a.careless"}).asks_for(MODULE, "a.careless")
    with pytest.raises(PlanError, match=r"a\.careless is pinned by .* and refuses"):
        select(problem(), MODULE, CPU, registry, policy({"deny": "a.careless"}, {"pin": "a.careless"}), {})


def test_a_pin_that_cannot_be_honoured_is_an_error_with_the_kernels_own_reason() -> None:
    with pytest.raises(PlanError) as raised:
        select(problem(40), MODULE, CPU, toy_registry(), policy({"pin": "toy.fast"}), {})
    assert raised.value.code == "QP-PLAN-PIN"
    assert "toy.fast is pinned by test policy: rule 1 and refuses: in_features 40" in str(raised.value)
    with pytest.raises(PlanError, match=r"marlin\.w4 is pinned by .* and is not installed"):
        select(problem(), MODULE, CPU, toy_registry(), policy({"pin": "marlin.w4"}), {})


def test_when_everyone_refuses_the_error_lists_every_reason_and_every_broken_plugin() -> None:
    def quantplug_kernels() -> list[object]:
        raise ImportError("No module named 'vendor_lib'")

    broken = SimpleNamespace(quantplug_api=">=1,<2", quantplug_kernels=hookimpl(quantplug_kernels))
    registry = build_registry({"toys": toys, "quantplug-vendor": broken})
    with pytest.raises(PlanError) as raised:
        select(problem(), MODULE, Platform.parse("cuda:9.0"), registry, policy({"deny": "reference"}), {})
    assert raised.value.code == "QP-PLAN-NOKERNEL"
    text = str(raised.value)
    assert "no kernel runs [48, 32] int8 per channel, bfloat16 on cuda:9.0" in text
    assert "toy.fast (toys): runs on cpu, not on cuda:9.0" in text
    assert "quantplug-vendor" in text
    assert "vendor_lib" in text


def test_on_an_accelerator_no_kernel_takes_over_that_cannot_be_captured() -> None:
    class Few(toys.ToyKernel):
        name = "a.few"
        layout_id = "a"

        def supports(self, problem: LinearProblem, platform: Platform) -> Verdict:
            return Accepted(Cost(5.0, 2.0), dequantize_us=1e6)

    class Waits(Few):
        name = "a.waits"
        traits = Traits(graph_safe=False)

        def supports(self, problem: LinearProblem, platform: Platform) -> Verdict:
            return Accepted(Cost(20.0, 0.5), dequantize_us=1e6)

    registry = vendor_of(Few(), Waits())
    gpu = Platform.parse("cuda:9.0")
    assert select(problem(), MODULE, gpu, registry, Policy(), {}).choices == (Choice("a.few", "a"),)
    assert select(problem(), MODULE, CPU, registry, Policy(), {}).choices[1] == Choice("a.waits", "a", 16, None)
    alone = select(problem(), MODULE, gpu, registry, policy({"deny": "a.few*"}), {})
    assert alone.choices == (Choice("a.waits", "a"),)


def test_segments_that_differ_are_split_for_a_kernel_that_needs_them_uniform() -> None:
    decision = select(problem(32, INT8, INT4), MODULE, CPU, toy_registry(), Policy(), {})
    verdict = next(c.verdict for c in decision.candidates if c.kernel == "toy.fast")
    assert isinstance(verdict, Accepted)
    assert verdict.cost == Cost(10.0, 4.0)
    assert verdict.notes == ("split into 2 calls: segments differ",)


def test_the_choice_does_not_depend_on_the_order_in_which_plugins_are_named() -> None:
    class Twin(toys.ToyKernel):
        name = "a.twin"
        layout_id = "twin"

        def supports(self, problem: LinearProblem, platform: Platform) -> Verdict:
            return Accepted(Cost(5.0, 2.0))

    @hookimpl
    def quantplug_kernels() -> list[object]:
        return [Twin()]

    plugins = {"toys": toys, "twins": SimpleNamespace(quantplug_api=">=1,<2", quantplug_kernels=quantplug_kernels)}
    decisions = [
        select(problem(), MODULE, CPU, build_registry(dict(order)), Policy(), {})
        for order in itertools.permutations(plugins.items())
    ]
    assert decisions[0] == decisions[1]
    assert decisions[0].kernel == "a.twin"


class Raises(toys.ToyKernel):
    name = "a.broken"
    layout_id = "broken"

    def supports(self, problem: LinearProblem, platform: Platform) -> Verdict:
        raise SystemExit("no licence")

    def probe(self, platform: Platform) -> Rejected | None:
        raise OSError("no such device")


class Lies(toys.ToyKernel):
    name = "a.liar"
    layout_id = "liar"

    def supports(self, problem: LinearProblem, platform: Platform) -> Verdict:
        return True  # type: ignore[return-value]  # what a careless plugin does

    def probe(self, platform: Platform) -> Rejected | None:
        return "fine"  # type: ignore[return-value]  # what a careless plugin does


def test_a_kernel_that_raises_or_answers_nonsense_is_disqualified_and_the_others_are_asked() -> None:
    @hookimpl
    def quantplug_kernels() -> list[object]:
        return [Raises(), Lies()]

    vendor = SimpleNamespace(quantplug_api=">=1,<2", quantplug_kernels=quantplug_kernels)
    registry = build_registry({"toys": toys, "vendor": vendor})
    decision = select(problem(), MODULE, CPU, registry, Policy(), {})
    assert decision.kernel == "toy.fast"
    verdicts = {c.kernel: c.verdict for c in decision.candidates}
    assert verdicts["a.broken"] == Rejected(
        "error", "supports raised SystemExit: no licence", "report it to the maker of a.broken"
    )
    assert verdicts["a.liar"] == Rejected("error", "supports returned bool", "report it to the maker of a.liar")
    probes = probe_kernels(registry, CPU)
    assert probes["a.broken"] == Rejected(
        "error", "probe raised OSError: no such device", "report it to the maker of a.broken"
    )
    assert probes["a.liar"] == Rejected("error", "probe returned str", "report it to the maker of a.liar")
    assert probes["toy.fast"] is None
