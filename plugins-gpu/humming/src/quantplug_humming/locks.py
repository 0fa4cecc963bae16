"""
The counters by which humming's parts of a sum wait for each other. They are zero between calls, and a stream's own.
"""

from __future__ import annotations

from functools import cache
from threading import Lock

import torch

from quantplug.cudacalls import stream_of

_STREAMS = 64
_COUNTERS = 2048

_streams: dict[tuple[int, int], torch.Tensor] = {}
"""The counters that each stream of a device has."""

_taking = Lock()


def locks(device: torch.device) -> torch.Tensor:
    """Return the counters of the current stream; the 65th stream of a device shares those of the first."""
    key = device.index, stream_of(device.index)
    found = _streams.get(key)
    return _take(key) if found is None else found


def _take(key: tuple[int, int]) -> torch.Tensor:
    """Return counters for a stream that has none yet; threads that ask at once for one stream get the same."""
    with _taking:
        if key not in _streams:
            number = sum(device == key[0] for device, _ in _streams)
            _streams[key] = counters(key[0])[number % _STREAMS]
        return _streams[key]


@cache
def counters(device: int) -> torch.Tensor:
    """Return the counters of all streams of a device; made before a graph is captured, they outlive it."""
    return torch.zeros(_STREAMS, _COUNTERS, dtype=torch.int32, device=torch.device("cuda", device))
