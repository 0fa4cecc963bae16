"""
How long a call takes: warmed up, over weights that no cache holds, the median of several samples.

On a GPU calls are captured into one graph, which is replayed, so that what the host does between launches is not part
of it; a kernel that cannot be captured is timed between events, host included, as it would run.
"""

from __future__ import annotations

import random
import statistics
import time
from dataclasses import dataclass
from itertools import cycle, islice
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    Sampler = Callable[[], float]
    """Takes a sample: returns microseconds of a call."""

COLD_BYTES = {"cpu": 96_000_000, "cuda": 200_000_000}
"""Weights that take turns hold at least this much: several times a GPU's cache, more than a core's share of a CPU's."""

_OTHER_COLD_BYTES = 200_000_000
_MOST_COPIES = 64
_SAMPLES, _FEWEST_SAMPLES = 9, 3
_SAMPLE_SECONDS = 2e-3
"""A sample of calls takes at least this long."""
_GRAPH_SECONDS, _LONGEST_GRAPH_SECONDS = 1e-3, 20e-3
"""A graph takes about as long as the first, and not longer than the second where some of the turns suffice for that."""
_TRIED = 4
"""Calls by which that is estimated."""
_BUSY_CYCLES = 400_000
"""A fifth of a millisecond: longer than the host needs to launch a graph, or to enqueue a call."""


@dataclass(frozen=True, slots=True)
class Ceilings:
    """
    What a machine reaches in the simplest cases.

    Attributes:
        read: bytes per second of summing up memory that no cache holds.
        flops: operations per second of a large square product, by torch name of the dtype.
    """

    read: float
    flops: Mapping[str, float]


def cold_copies(tensors: Mapping[str, torch.Tensor], device: torch.device) -> list[dict[str, torch.Tensor]]:
    """Return so many copies of a layer's tensors, the first being themselves, that they are cold at their turn."""
    size = max(1, sum(tensor.nbytes for tensor in tensors.values()))
    wanted = COLD_BYTES.get(device.type, _OTHER_COLD_BYTES)
    count = max(1, min(_MOST_COPIES, -(-wanted // size)))
    return [dict(tensors), *({name: tensor.clone() for name, tensor in tensors.items()} for _ in range(count - 1))]


def per_call(
    call: Callable[[Any], object], turns: Sequence[Any], device: torch.device, *, seconds: float, graph: bool = True
) -> float:
    """
    Return the median microseconds of a call.

    Args:
        call: what is timed; it takes one of `turns`.
        turns: weights that take their turn.
        device: where it runs.
        seconds: how long to measure, about; at least three samples are taken, whatever they take.
        graph: whether the call may be captured.
    """
    [us] = in_turns([sampler(call, turns, device, graph=graph)], seconds=seconds)
    return statistics.median(us)


def sampler(
    call: Callable[[Any], object], turns: Sequence[Any], device: torch.device, *, graph: bool = True
) -> Sampler:
    """Warm a call up, capture it where that is due, and return what takes a sample of it; arguments as `per_call`."""
    for turn in turns[:2]:
        call(turn)
    if device.type == "cuda":
        return _replaying(call, turns) if graph else _long_enough(_between_events(call, turns))
    return _long_enough(_on_the_host(call, turns, device))


def in_turns(samplers: Sequence[Sampler], *, seconds: float, fewest: int = _FEWEST_SAMPLES) -> list[list[float]]:
    """
    Return the microseconds of each of several calls, sample by sample.

    A GPU at its power limit is as fast as what ran shortly before lets it be. So calls that are compared take turns, a
    sample each, in an order drawn anew for every round; and a first round, in which it settles, does not count.

    Args:
        samplers: of the calls, see `sampler`; all that they captured lies in memory at once.
        seconds: how long to measure each, about.
        fewest: rounds that are made whatever they take.
    """
    order, dice = list(range(len(samplers))), random.Random(0)  # noqa: S311  # an order, no secret
    found: list[list[float]] = [[] for _ in samplers]
    started, rounds = time.perf_counter(), -1
    while rounds < fewest or (rounds < _SAMPLES and time.perf_counter() - started < seconds * len(samplers)):
        dice.shuffle(order)
        for number in order:
            found[number].append(samplers[number]())
        rounds += 1
    return [us[1:] for us in found]


def ceilings(device: torch.device, dtypes: Sequence[str], *, seconds: float = 0.3) -> Ceilings:
    """Measure what the machine reaches."""
    on_cpu = device.type == "cpu"
    memory = torch.ones((256 if on_cpu else 2048) * 250_000, device=device)
    read = memory.nbytes / per_call(torch.sum, [memory], device, seconds=seconds) * 1e6
    flops: dict[str, float] = {}
    for dtype in dtypes:
        size = 1024 if on_cpu else 8192
        square = torch.randn(size, size, device=device).to(getattr(torch, dtype))
        us = per_call(lambda w, x=square: torch.nn.functional.linear(x, w), [square.clone()], device, seconds=seconds)  # type: ignore[misc]  # mypy infers no type for a default
        flops[dtype] = 2 * size**3 / us * 1e6
    return Ceilings(read, flops)


def _nothing() -> None:
    """What there is to wait for where calls are done when they return."""


def _long_enough(sample: Callable[[int], float]) -> Sampler:
    """Return a sampler of so many calls that it takes long enough to be read off a clock; `sample` gives seconds."""
    calls = max(1, round(_SAMPLE_SECONDS / max(1e-7, sample(1))))
    return lambda: sample(calls) * 1e6


def _on_the_host(call: Callable[[Any], object], turns: Sequence[Any], device: torch.device) -> Callable[[int], float]:
    wait = _nothing if device.type == "cpu" else torch.accelerator.synchronize
    following = cycle(turns)

    def sample(calls: int) -> float:
        wait()
        started = time.perf_counter()
        for turn in islice(following, calls):
            call(turn)
        wait()
        return (time.perf_counter() - started) / calls

    return sample


def _between_events(call: Callable[[Any], object], turns: Sequence[Any]) -> Callable[[int], float]:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    following = cycle(turns)

    def sample(calls: int) -> float:
        begin.record()
        for turn in islice(following, calls):
            call(turn)
        end.record()
        end.synchronize()
        milliseconds: float = begin.elapsed_time(end)
        return milliseconds / 1e3 / calls

    return sample


def _replaying(call: Callable[[Any], object], turns: Sequence[Any]) -> Sampler:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def seconds(run: Callable[[], object], busy: int) -> float:
        # The GPU has something to do until the host has enqueued all of it, whose time would count otherwise.
        torch.cuda._sleep(busy)
        begin.record()
        run()
        end.record()
        end.synchronize()
        milliseconds: float = begin.elapsed_time(end)
        return max(1e-6, milliseconds / 1e3)

    some = turns[:_TRIED]
    once = seconds(lambda: [call(turn) for turn in some], _TRIED * _BUSY_CYCLES) / len(some)
    # All turns as often as it takes, or, of a call that takes long, a few of them.
    used = turns[: max(1, round(_LONGEST_GRAPH_SECONDS / once))]
    repeats = max(1, round(_GRAPH_SECONDS / (once * len(used))))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            for turn in used:
                call(turn)
    graph.replay()  # the first one takes longer
    return lambda: seconds(graph.replay, _BUSY_CYCLES) * 1e6 / (repeats * len(used))
