"""
The surroundings: shapes, strides, memory, repetition, threads, the compiler, device graphs and streams.
"""

from __future__ import annotations

import shutil
import warnings
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import TYPE_CHECKING

import pytest
import torch

from quantplug_testkit.compare import assert_bitwise_equal
from quantplug_testkit.conformance.case import Subject, assert_unchanged, snapshot

if TYPE_CHECKING:
    from collections.abc import Iterator

    from quantplug_testkit.conformance.case import Case
    from quantplug_testkit.conformance.problems import Hazard


class RuntimeTests(Subject):
    """`apply`, in every way a model calls it."""

    def test_leading_dimensions_are_kept(self, family: Hazard) -> None:
        """An x of 1, 2, 3 and 4 dimensions, with and without rows, gives y of the same leading dimensions."""
        case = self.case(family)
        for leading in ((), (1,), (1, 1), (2, 3), (2, 1, 3), (0,), (2, 0), (0, 3, 2)):
            rows = torch.Size(leading).numel()
            x = case.inputs(rows).reshape(*leading, family.problem.in_features)
            case.check(x, case.apply(x), f"y for x {list(x.shape)}")

    def test_input_of_any_stride_is_read_right(self, family: Hazard) -> None:
        """Sliced, transposed, offset and expanded x, between NaN that must not be read."""
        case = self.case(family)
        for what, x in _views(case):
            case.check(x, case.apply(x), f"y for {what}")

    def test_apply_leaves_its_operands_alone(self, family: Hazard) -> None:
        """x, the bias and what was prepared hold the same bits before and after."""
        case = self.case(family)
        for rows in (1, 17):
            operands = {"x": case.inputs(rows), **case.prepared.tensors}
            if case.bias is not None:
                operands["bias"] = case.bias
            before = snapshot(operands)
            case.apply(operands["x"])
            assert_unchanged(before, operands, f"apply with {rows} rows [{family.name}]")

    def test_results_do_not_depend_on_other_calls(self, family: Hazard) -> None:
        """A result is fresh memory: the next call neither changes it nor takes anything from it."""
        case = self.case(family)
        for rows in (1, 17):
            x, other = case.inputs(rows), case.inputs(rows, seed=1)
            first = case.apply(x)
            kept = first.clone()
            second = case.apply(other)
            assert_bitwise_equal(first, kept, f"the first of two results after the second call [{family.name}]")
            case.check(x, first, "the first of two results")
            case.check(other, second, "the second of two results")
            second.fill_(float("nan"))
            case.check(x, case.apply(x), "a result after an earlier one was overwritten")

    def test_product_is_right_with_several_threads(self, family: Hazard) -> None:
        """Work that is cut into three, so that no size divides evenly, adds up to the same."""
        case = self.case(family)
        threads = torch.get_num_threads()
        torch.set_num_threads(3)
        try:
            for rows in (1, 200):
                x = case.inputs(rows)
                case.check(x, case.apply(x), f"y for {rows} rows on three threads")
        finally:
            torch.set_num_threads(threads)

    def test_same_input_gives_the_same_bits(self, family: Hazard) -> None:
        """Where the traits say deterministic, repetition shows no difference."""
        case = self.case(family)
        for rows in (1, 17, 200):
            x = case.inputs(rows)
            first = case.apply(x)
            for _ in range(3):
                case.check_again(first, case.apply(x), x, f"a repeated y for {rows} rows")

    def test_inference_mode_gives_the_same_bits(self, family: Hazard) -> None:
        """A model runs under no_grad or inference_mode; the numbers are those of plain mode."""
        case = self.case(family)
        x = case.inputs(3)
        first = case.apply(x)
        with torch.no_grad():
            case.check_again(first, case.apply(x), x, "y under no_grad")
        with torch.inference_mode():
            case.check_again(first, case.apply(x), x, "y under inference_mode")

    def test_threads_do_not_disturb_each_other(self, family: Hazard) -> None:
        """Two threads that run the same layer at once get what they get alone."""
        case = self.case(family)
        inputs = [case.inputs(17, seed) for seed in range(2)]
        alone = [case.apply(x) for x in inputs]
        together = Barrier(len(inputs), timeout=60)

        def work(x: torch.Tensor) -> list[torch.Tensor]:
            together.wait()
            return [case.apply(x) for _ in range(3)]

        with ThreadPoolExecutor(len(inputs)) as pool:
            for x, expected, results in zip(inputs, alone, pool.map(work, inputs), strict=True):
                for result in results:
                    case.check_again(expected, result, x, "y with another thread at work")

    def test_compiles_into_one_graph(self, sample: Hazard) -> None:
        """torch.compile traces the call without a break, for any number of rows, and the numbers stay right."""
        _check_compiled(self.case(sample), "aot_eager", (17, 3, 1, 0, 64))

    @pytest.mark.slow
    def test_compiles_to_machine_code(self, sample: Hazard) -> None:
        """The same through inductor, where this machine has a C++ compiler."""
        if torch.device(self.device).type == "cpu" and not (shutil.which("g++") or shutil.which("clang++")):
            pytest.skip("inductor needs g++ or clang++ on the CPU, and neither is here")
        _check_compiled(self.case(sample), "inductor", (17, 1))

    def test_a_captured_graph_follows_its_input(self, sample: Hazard) -> None:
        """Where the traits say graph-safe, a graph that was captured once gives the product of what x holds by then."""
        if not self.kernel.traits.graph_safe or torch.device(self.device).type != "cuda":
            pytest.skip("captures on a CUDA device what says that it is graph-safe")
        case = self.case(sample)
        for rows in (1, 17, 200):
            x = case.inputs(rows)
            case.apply(x)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                y = case.apply_plainly(x)
            for seed in (1, 2):
                x.copy_(case.inputs(rows, seed))
                graph.replay()
                case.check(x, y, f"y of a replayed graph for {rows} rows")

    def test_streams_do_not_disturb_each_other(self, sample: Hazard) -> None:
        """Calls on two streams at once give what each gives alone: they share no memory of the kernel's own."""
        if torch.device(self.device).type != "cuda":
            pytest.skip("takes streams of a CUDA device")
        case = self.case(sample)
        for rows in (1, 17, 200):
            inputs = [case.inputs(rows, seed) for seed in range(2)]
            alone = [case.apply(x) for x in inputs]
            streams = [torch.cuda.Stream() for _ in inputs]
            torch.cuda.synchronize()
            results: list[list[torch.Tensor]] = [[], []]
            for _ in range(20):
                for x, stream, found in zip(inputs, streams, results, strict=True):
                    with torch.cuda.stream(stream):
                        found.append(case.apply_plainly(x))
            torch.cuda.synchronize()
            for x, expected, found in zip(inputs, alone, results, strict=True):
                for y in found:
                    case.check_again(expected, y, x, f"y for {rows} rows beside another stream")


def _check_compiled(case: Case, backend: str, numbers_of_rows: tuple[int, ...]) -> None:
    __tracebackhide__ = True
    torch.compiler.reset()
    compiled = torch.compile(case.apply_plainly, fullgraph=True, backend=backend)
    with warnings.catch_warnings():
        # the compiler warns about what it imports itself
        warnings.simplefilter("ignore", DeprecationWarning)
        for rows in numbers_of_rows:
            x = case.inputs(rows)
            case.check(x, compiled(x), f"compiled y for {rows} rows")


def _views(case: Case) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield x with the same kind of values in other memory orders; everything around it is NaN."""
    rows, size = 17, case.hazard.problem.in_features
    dense = case.inputs(rows)

    def hole(*shape: int) -> torch.Tensor:
        return torch.full(shape, float("nan"), dtype=dense.dtype, device=dense.device)

    for what, view in (
        ("every second column", hole(rows, 2 * size)[:, ::2]),
        ("every second row", hole(2 * rows, size)[::2]),
        ("a transposed x", hole(size, rows).t()),
        ("an x inside a larger one", hole(rows + 2, size + 3)[1:-1, 2:-1]),
    ):
        view.copy_(dense)
        yield what, view
    single = hole(size, 3)[:, 1]
    single.copy_(dense[0])
    yield "one row with gaps", single.unsqueeze(0)
    yield "one row with gaps, without its dimension", single
    yield "one row expanded", dense[:1].expand(rows, size)
    swapped = hole(4, 3, size).transpose(0, 1)
    swapped.copy_(dense[:12].reshape(3, 4, size))
    yield "an x of swapped leading dimensions", swapped
