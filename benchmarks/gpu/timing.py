"""
How a call is timed on a GPU: captured into one graph over weights that no cache holds, replayed, the median per call.
"""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

COLD_BYTES = 200_000_000
"""Weights that take turns hold at least this much, several times what the cache does."""

MOST_COPIES = 64
_GRAPH_SECONDS = 1.5e-3
_REPLAYED_SECONDS = 0.04


def copies_of(tensors: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    """Return so many copies of a layer's tensors that they are cold when their turn comes."""
    size = sum(tensor.nbytes for tensor in tensors.values())
    count = max(1, min(MOST_COPIES, -(-COLD_BYTES // size)))
    return [tensors, *({name: tensor.clone() for name, tensor in tensors.items()} for _ in range(count - 1))]


def per_call(call: Callable[[Any], object], turns: Sequence[Any], replays: int = 0) -> float:
    """
    Return the median microseconds of a call.

    Args:
        call: what is timed; it takes one of `turns`.
        turns: weights that take their turn.
        replays: of the graph; each gives one figure. 0 for 5 to 15 of them, by how long they take.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for turn in turns[:2]:
            call(turn)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for turn in turns:
            call(turn)
        end.record()
        end.synchronize()
        estimate = max(2e-6, begin.elapsed_time(end) / 1e3 / len(turns))
    torch.cuda.current_stream().wait_stream(stream)
    rounds = max(1, round(_GRAPH_SECONDS / (estimate * len(turns))))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for turn in turns:
                call(turn)
    replays = replays or max(5, min(15, round(_REPLAYED_SECONDS / (estimate * len(turns) * rounds))))
    times = []
    for number in range(replays + 2):
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        if number >= 2:
            times.append(begin.elapsed_time(end) * 1e3 / (rounds * len(turns)))
    return float(statistics.median(times))
