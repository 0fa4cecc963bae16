"""
What this machine can do: the yardsticks that benchmarks put beside their figures.
"""

from __future__ import annotations

import platform
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable


def read_bandwidth(megabytes: int = 256, runs: int = 7, clock: Callable[[], float] = time.perf_counter) -> float:
    """Return bytes per second of reading memory that no cache holds: a float32 sum over a large tensor."""
    tensor = torch.ones(megabytes * 1_000_000 // 4)
    tensor.sum()
    times = []
    for _ in range(runs):
        started = clock()
        tensor.sum()
        times.append(clock() - started)
    return tensor.nbytes / statistics.median(times)


def describe() -> dict[str, object]:
    """Return processor, threads and versions, to stand beside every figure."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = (line for line in info.read_text().splitlines() if line.startswith("model name"))
        model = next(lines, model).partition(":")[2].strip() or model
    return {"processor": model, "threads": torch.get_num_threads(), "torch": torch.__version__}
