"""
The surroundings: strides, memory, repetition, threads, the compiler, device graphs and streams.
"""

from __future__ import annotations

import warnings
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import TYPE_CHECKING

import pytest
import torch

from quantplug_testkit.compare import assert_bitwise_equal
from quantplug_testkit.conformance.case import assert_unchanged, snapshot
from quantplug_testkit.conformance.experts.case import ExpertSubject
from quantplug_testkit.conformance.experts.routing import Routing, scatter

if TYPE_CHECKING:
    from collections.abc import Iterator

    from quantplug_testkit.conformance.experts.hazard import ExpertHazard


class ExpertRuntimeTests(ExpertSubject):
    """`apply`, in every way a model calls it."""

    def test_input_of_any_stride_is_read_right(self, form: ExpertHazard) -> None:
        """Sliced, transposed and offset x, between NaN that must not be read."""
        case = self.case(form)
        routing = case.route(17)
        for what, x in _views(case.inputs(17), torch.nan):
            case.check(x, routing, case.apply(x, routing), f"y for x as {what}")

    def test_routing_of_any_stride_is_read_right(self, form: ExpertHazard) -> None:
        """Sliced, transposed and offset ids and weights, between others that must not be read."""
        case = self.case(form)
        x, routing = case.inputs(17), case.route(17)
        ids, weights = _views(routing.ids, form.problem.experts - 1), _views(routing.weights, torch.nan)
        for (what, one), (_, other) in zip(ids, weights, strict=True):
            strided = Routing(other, one)
            case.check(x, strided, case.apply(x, strided), f"y for ids and weights as {what}")

    def test_apply_leaves_its_operands_alone(self, form: ExpertHazard) -> None:
        """x, what the router says, the map and what was prepared hold the same bits before and after."""
        case = self.case(form)
        for rows in (1, 17):
            routing = scatter(form, case.route(rows).to("cpu")).to(case.device)
            operands = {"x": case.inputs(rows), "weights": routing.weights, "ids": routing.ids}
            if routing.expert_map is not None:
                operands["expert_map"] = routing.expert_map
            operands |= case.prepared.named_tensors()
            before = snapshot(operands)
            case.apply(operands["x"], routing)
            assert_unchanged(before, operands, f"apply with {rows} rows [{form.name}]")

    def test_results_do_not_depend_on_other_calls(self, form: ExpertHazard) -> None:
        """A result is fresh memory: other calls, with fewer rows or none for an expert, change nothing in it."""
        case = self.case(form)
        for rows in (1, 17):
            x, routing = case.inputs(rows), case.route(rows)
            other, elsewhere = case.inputs(rows, seed=1), case.route(rows, "one-expert", seed=1)
            first = case.apply(x, routing)
            kept = first.clone()
            second = case.apply(other, elsewhere)
            assert_bitwise_equal(first, kept, f"the first of two results after the second call [{form.name}]")
            case.check(x, routing, first, "the first of two results")
            case.check(other, elsewhere, second, "the second of two results")
            second.fill_(torch.nan)
            case.check(x, routing, case.apply(x, routing), "a result after an earlier one was overwritten")

    def test_same_input_gives_the_same_bits(self, form: ExpertHazard) -> None:
        """Where the traits say deterministic, repetition shows no difference, not even where an id is repeated."""
        case = self.case(form)
        for rows, kind in ((1, "mixed"), (17, "mixed"), (17, "repeated")):
            x, routing = case.inputs(rows), case.route(rows, "repeated" if kind == "repeated" else "mixed")
            first = case.apply(x, routing)
            for _ in range(3):
                case.check_again(first, case.apply(x, routing), x, routing, f"a repeated y for {rows} rows")

    def test_result_is_right_with_several_threads(self, form: ExpertHazard) -> None:
        """Work that is cut into three, so that no size divides evenly, adds up to the same."""
        case = self.case(form)
        threads = torch.get_num_threads()
        torch.set_num_threads(3)
        try:
            for rows in (1, 70):
                x, routing = case.inputs(rows), case.route(rows)
                case.check(x, routing, case.apply(x, routing), f"y for {rows} rows on three threads")
        finally:
            torch.set_num_threads(threads)

    def test_inference_mode_gives_the_same_bits(self, form: ExpertHazard) -> None:
        """A model runs under no_grad or inference_mode; the numbers are those of plain mode."""
        case = self.case(form)
        x, routing = case.inputs(3), case.route(3)
        first = case.apply(x, routing)
        with torch.no_grad():
            case.check_again(first, case.apply(x, routing), x, routing, "y under no_grad")
        with torch.inference_mode():
            case.check_again(first, case.apply(x, routing), x, routing, "y under inference_mode")

    def test_threads_do_not_disturb_each_other(self, form: ExpertHazard) -> None:
        """Two threads that run the same layer at once get what they get alone."""
        case = self.case(form)
        given = [(case.inputs(17, seed), case.route(17, seed=seed)) for seed in range(2)]
        alone = [case.apply(*each) for each in given]
        together = Barrier(len(given), timeout=60)

        def work(each: tuple[torch.Tensor, Routing]) -> list[torch.Tensor]:
            together.wait()
            return [case.apply(*each) for _ in range(3)]

        with ThreadPoolExecutor(len(given)) as pool:
            for (x, routing), expected, results in zip(given, alone, pool.map(work, given), strict=True):
                for result in results:
                    case.check_again(expected, result, x, routing, "y with another thread at work")

    def test_compiles_into_one_graph(self, sample: ExpertHazard) -> None:
        """Where the traits say graph-safe, torch.compile traces the call without a break, for any number of rows."""
        if not self.kernel.traits.graph_safe:
            pytest.skip(f"{self.kernel.name} says that it is not graph-safe")
        case = self.case(sample)
        case.apply(case.inputs(1), case.route(1))
        torch.compiler.reset()
        prepared, kernel = case.prepared, case.kernel

        def call(x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
            return kernel.apply(x, weights, ids, prepared)

        compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
        with warnings.catch_warnings():
            # the compiler warns about what it imports itself
            warnings.simplefilter("ignore", DeprecationWarning)
            for rows in (17, 3, 0):
                x, routing = case.inputs(rows), case.route(rows)
                case.check(x, routing, compiled(x, routing.weights, routing.ids), f"compiled y for {rows} rows")

    def test_a_captured_graph_follows_the_router(self, sample: ExpertHazard) -> None:
        """Where the traits say graph-safe, a graph that was captured once gives what other rows and ids ask for."""
        if not self.kernel.traits.graph_safe or torch.device(self.device).type != "cuda":
            pytest.skip("captures on a CUDA device what says that it is graph-safe")
        case = self.case(sample)
        for rows in (1, 17):
            x, routing = case.inputs(rows), case.route(rows, "one-expert")
            case.apply(x, routing)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                y = case.apply_plainly(x, routing)
            for seed in range(2):
                new, other = case.inputs(rows, seed), case.route(rows, seed=seed)
                for held, now in ((x, new), (routing.weights, other.weights), (routing.ids, other.ids)):
                    held.copy_(now)
                graph.replay()
                case.check(new, other, y, f"y of a replayed graph for {rows} rows")

    def test_streams_do_not_disturb_each_other(self, sample: ExpertHazard) -> None:
        """Calls on two streams at once give what each gives alone: they share no memory of the kernel's own."""
        if torch.device(self.device).type != "cuda":
            pytest.skip("takes streams of a CUDA device")
        case = self.case(sample)
        for rows in (1, 17):
            given = [(case.inputs(rows, seed), case.route(rows, seed=seed)) for seed in range(2)]
            alone = [case.apply(*each) for each in given]
            streams = [torch.cuda.Stream() for _ in given]
            torch.cuda.synchronize()
            results: list[list[torch.Tensor]] = [[], []]
            for _ in range(20):
                for each, stream, found in zip(given, streams, results, strict=True):
                    with torch.cuda.stream(stream):
                        found.append(case.apply_plainly(*each))
            torch.cuda.synchronize()
            for (x, routing), expected, found in zip(given, alone, results, strict=True):
                for y in found:
                    case.check_again(expected, y, x, routing, f"y for {rows} rows beside another stream")


def _views(dense: torch.Tensor, around: float) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the same values in other memory orders, with something else around them."""
    rows, columns = dense.shape

    def hole(*shape: int) -> torch.Tensor:
        return torch.full(shape, around, dtype=dense.dtype, device=dense.device)

    for what, view in (
        ("every second column", hole(rows, 2 * columns)[:, ::2]),
        ("every second row", hole(2 * rows, columns)[::2]),
        ("a transposed view", hole(columns, rows).t()),
        ("the middle of a larger one", hole(rows + 2, columns + 3)[1:-1, 2:-1]),
    ):
        view.copy_(dense)
        yield what, view
