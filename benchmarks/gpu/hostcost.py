"""
What a call costs the host: the time until it is enqueued, without a graph.
"""

from __future__ import annotations

import time
from itertools import repeat
from statistics import median
from typing import TYPE_CHECKING

import torch

from benchmarks.gpu.cases import LinearCase

if TYPE_CHECKING:
    from collections.abc import Callable

    from benchmarks.gpu.cases import Case

HOST_SHAPE = (4096, 4096)
HOST_ROWS = (1, 16)

_CALLS = 200
"""In a row. A GPU's queue holds about a thousand launches, so that none of them waits until there is room."""
_REPEATS = 5


def is_enqueued(case: Case, rows: int) -> bool:
    """Return whether the host's time is measured for a layer and number of rows: it hardly depends on either."""
    return isinstance(case, LinearCase) and (case.n, case.k) == HOST_SHAPE and rows in HOST_ROWS


def enqueue_us(call: Callable[[], object]) -> float:
    """Return the microseconds after which a call returns that waits for nothing: the median of some series."""
    found = []
    for _ in range(1 + _REPEATS):
        torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in repeat(None, _CALLS):
            call()
        found.append((time.perf_counter() - started) / _CALLS * 1e6)
    torch.cuda.synchronize()
    return median(found[1:])  # the first warms up
