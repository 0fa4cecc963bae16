"""What tests of several kernels ask of a prepared layer on a CUDA device: graphs, streams, calls in a row."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from quantplug_testkit.bounds import linear_bound
from quantplug_testkit.canonical import segment_of, to_float64
from quantplug_testkit.compare import assert_bitwise_equal, assert_within
from quantplug_testkit.oracles.linear import linear

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import pytest

    from quantplug.kernel import LinearKernel
    from quantplug.weight import Prepared, Weight
    from quantplug_testkit.conformance.experts.case import ExpertCase


def check_product(x: torch.Tensor, y: torch.Tensor, weight: Weight, what: str) -> None:
    """Hold y against the oracle's product of x and a weight, which nothing beside the output is rounded in."""
    segment, rows = segment_of(weight), to_float64(x)
    bound = linear_bound(rows, [segment], None, str(x.dtype).removeprefix("torch."))
    assert_within(y, linear(rows, segment.values()), bound, what)


def check_graph(
    kernel: LinearKernel, prepared: Prepared, weight: Weight, inputs: Callable[[], torch.Tensor], what: str
) -> None:
    """Replay a graph for other inputs than it was captured with."""
    x = inputs()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = kernel.apply(x, prepared, None)
    for _ in range(3):
        x.copy_(inputs())
        graph.replay()
        check_product(x, y, weight, f"{what}, replayed")
        assert_bitwise_equal(y, kernel.apply(x, prepared, None), "the same without a graph")


def on_two_streams(
    kernel: LinearKernel, prepared: Prepared, given: Sequence[torch.Tensor], calls: int
) -> list[list[torch.Tensor]]:
    """Return the results of calls in turns on two streams, for each stream's own x."""
    streams = [torch.cuda.Stream() for _ in given]
    torch.cuda.synchronize()
    results: list[list[torch.Tensor]] = [[] for _ in given]
    for _ in range(calls):
        for x, stream, found in zip(given, streams, results, strict=True):
            with torch.cuda.stream(stream):
                found.append(kernel.apply(x, prepared, None))
    torch.cuda.synchronize()
    return results


def check_two_streams(
    kernel: LinearKernel, prepared: Prepared, inputs: Callable[[], torch.Tensor], calls: int = 50
) -> None:
    """Compare with what each x gives alone, bit by bit."""
    given = [inputs() for _ in range(2)]
    alone = [kernel.apply(x, prepared, None) for x in given]
    for wanted, found in zip(alone, on_two_streams(kernel, prepared, given, calls), strict=True):
        assert all(torch.equal(y, wanted) for y in found)


def check_chain(kernel: LinearKernel, layers: Sequence[Prepared], inputs: Callable[[int], torch.Tensor]) -> None:
    """
    Run layers one after the other, with nothing between them.

    Where kernels overlap, each may begin before the one ahead of it has finished, and must wait before it reads x.
    """
    for rows in (1, 16, 64):
        x = inputs(rows)
        apart = x
        for prepared in layers:
            apart = kernel.apply(apart, prepared, None)
            torch.cuda.synchronize()
        for _ in range(20):
            y = x
            for prepared in layers:
                y = kernel.apply(y, prepared, None)
            assert_bitwise_equal(y, apart, f"{len(layers)} layers, {rows} rows")


def check_that_calls_compile_nothing(
    kernel: LinearKernel,
    prepared: Prepared,
    inputs: Callable[[int], torch.Tensor],
    known: object,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Forget the ways that the module `known` remembers, and call with numbers of rows that take each of Marlin's."""

    def refuse(*_: object) -> None:
        raise AssertionError("compiled by a call")

    monkeypatch.setattr("quantplug_marlin.device.cubin", refuse)
    monkeypatch.setattr(known, "_ways", {})
    for rows in (1, 8, 9, 17, 33, 64, 65, 128, 200, 1000):
        kernel.apply(inputs(rows), prepared, None)


def check_experts(case: ExpertCase, rows: int) -> None:
    """Hold some rows against the oracle."""
    x, routing = case.inputs(rows), case.route(rows)
    case.check(x, routing, case.apply(x, routing), f"{rows} rows")


def check_that_a_graph_follows_the_router(case: ExpertCase, rows: int) -> None:
    """Replay a graph of experts for other rows and other choices than it was captured with."""
    x, routing = case.inputs(rows), case.route(rows)
    case.apply(x, routing)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = case.apply_plainly(x, routing)
    for seed in (1, 2):
        x.copy_(case.inputs(rows, seed))
        other = case.route(rows, seed=seed)
        routing.ids.copy_(other.ids)
        routing.weights.copy_(other.weights)
        graph.replay()
        case.check(x, routing, y, "replayed")
        if case.kernel.traits.deterministic:
            assert_bitwise_equal(y, case.apply(x, routing), "the same without a graph")
