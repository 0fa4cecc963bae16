"""
What a call costs the host: the time until it is enqueued, without a graph.
"""

from __future__ import annotations

import time
from itertools import repeat
from typing import TYPE_CHECKING

import torch

from benchmarks.gpu.cases import LinearCase

if TYPE_CHECKING:
    from collections.abc import Callable

    from benchmarks.gpu.cases import Case

HOST_SHAPE = (4096, 4096)
HOST_ROWS = (1, 16)
"""The layer, N and K, and the numbers of rows of which the host's part is measured."""

SERIES = 9
"""Of calls, the shortest of which counts: whatever else the host does only adds to it."""

_CALLS = 50
"""In a row. A GPU's queue holds about a thousand launches, so that none of them waits until there is room."""


def is_enqueued(case: Case, rows: int) -> bool:
    """Return whether the host's time is measured for a layer and number of rows: it hardly depends on either."""
    return isinstance(case, LinearCase) and (case.n, case.k) == HOST_SHAPE and rows in HOST_ROWS


def series_us(call: Callable[[], object]) -> float:
    """Return the microseconds of a call, from one series of calls that wait for nothing."""
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in repeat(None, _CALLS):
        call()
    return (time.perf_counter() - started) / _CALLS * 1e6
