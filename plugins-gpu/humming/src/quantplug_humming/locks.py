"""
The counters by which humming's parts of a sum wait for each other. They are zero between calls, and a stream's own.
"""

from __future__ import annotations

from functools import cache

import torch

_STREAMS = 64
_COUNTERS = 2048


def locks(device: torch.device) -> torch.Tensor:
    """Return the counters of the current stream; the 65th stream of a process shares those of the first."""
    stream = torch.cuda.current_stream(device).cuda_stream
    taken = _streams(device.index)
    return counters(device.index)[taken.setdefault(stream, len(taken) % _STREAMS)]


@cache
def counters(device: int) -> torch.Tensor:
    """Return the counters of all streams of a device; made before a graph is captured, they outlive it."""
    return torch.zeros(_STREAMS, _COUNTERS, dtype=torch.int32, device=torch.device("cuda", device))


@cache
def _streams(device: int) -> dict[int, int]:
    """Return which stream has which counters."""
    return {}
