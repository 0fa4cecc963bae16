"""
How long a call takes: warmed up, over weights that no cache holds, the median of several samples.

On a GPU calls are captured into one graph, which is replayed, so that what the host does between launches is not part
of it; a kernel that cannot be captured is timed between events, host included, as it would run.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

COLD_BYTES = {"cpu": 96_000_000, "cuda": 200_000_000}
"""Weights that take turns hold at least this much: several times a GPU's cache, more than a core's share of a CPU's."""

_OTHER_COLD_BYTES = 200_000_000
_MOST_COPIES = 64
_SAMPLES, _FEWEST_SAMPLES = 9, 3
_SAMPLE_SECONDS = 2e-3
"""A sample of a CPU, or of a graph, takes at least this long."""


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
    for turn in turns[:2]:
        call(turn)
    if device.type == "cuda":
        return _replayed(call, turns, seconds) if graph else _between_events(call, turns, seconds)
    wait = torch.accelerator.synchronize if device.type != "cpu" else _nothing
    position = 0

    def sample(calls: int) -> float:
        nonlocal position
        wait()
        started = time.perf_counter()
        for _ in range(calls):
            call(turns[position % len(turns)])
            position += 1
        wait()
        return (time.perf_counter() - started) / calls

    return _median_us(sample, seconds)


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


def _median_us(sample: Callable[[int], float], seconds: float) -> float:
    """Return the median of samples, each of so many calls that it takes long enough to be read off a clock."""
    first = max(1e-7, sample(1))
    calls = max(1, round(_SAMPLE_SECONDS / first))
    affordable = int(seconds / (first * calls))
    count = min(_SAMPLES, max(_FEWEST_SAMPLES, affordable))
    return statistics.median(sample(calls) for _ in range(count)) * 1e6


def _between_events(call: Callable[[Any], object], turns: Sequence[Any], seconds: float) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    position = 0

    def sample(calls: int) -> float:
        nonlocal position
        begin.record()
        for _ in range(calls):
            call(turns[position % len(turns)])
            position += 1
        end.record()
        end.synchronize()
        milliseconds: float = begin.elapsed_time(end)
        return milliseconds / 1e3 / calls

    return _median_us(sample, seconds)


def _replayed(call: Callable[[Any], object], turns: Sequence[Any], seconds: float) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        begin.record()
        for turn in turns:
            call(turn)
        end.record()
        end.synchronize()
        once = max(2e-6, begin.elapsed_time(end) / 1e3 / len(turns))
    torch.cuda.current_stream().wait_stream(stream)
    # All turns as often as it takes, or, of a call that takes long, a few of them.
    used = turns[: max(1, round(10 * _SAMPLE_SECONDS / once))]
    rounds = max(1, round(_SAMPLE_SECONDS / (once * len(used))))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for turn in used:
                call(turn)
    times: list[float] = []
    started = time.perf_counter()
    # Two replays warm up.
    while len(times) < _FEWEST_SAMPLES + 2 or (len(times) < _SAMPLES + 2 and time.perf_counter() - started < seconds):
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / (rounds * len(used)))
    return statistics.median(times[2:])
