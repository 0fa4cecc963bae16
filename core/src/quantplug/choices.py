"""
Who serves how many rows: kernels that can run what a layer holds, compared at each number of rows.
"""

from __future__ import annotations

from math import exp, log
from typing import TYPE_CHECKING

from quantplug.kernel import Accepted
from quantplug.plan import Choice
from quantplug.timings import time_at

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from typing import Literal

    from quantplug.moe import MoEProblem
    from quantplug.moekernel import Kernel
    from quantplug.plan import Candidate
    from quantplug.platform import Platform
    from quantplug.registry import Provided
    from quantplug.spec import LinearProblem

ROW_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
"""Numbers of rows M at which kernels are compared; between two of them the lower one's choice holds."""

_NOISE = 0.03
"""What medians of one kernel differ by from one run to the next; a gain below it is no reason for another kernel."""

_LEAST_US = 1e-6
"""What counts of a claim to take less, or no time at all: times are divided, and their logarithms taken."""


def time_of(candidate: Candidate, rows: int, basis: Literal["estimated", "measured"]) -> float:
    """Return the microseconds of an accepted candidate for M = `rows`, as they were measured or are estimated."""
    if basis == "measured":
        return time_at(candidate.measured, rows)
    if not isinstance(candidate.verdict, Accepted):
        raise TypeError(f"{candidate.kernel} was refused and has no cost")
    return max(_LEAST_US, candidate.verdict.cost.at(rows))


def time_of_fastest(candidates: Iterable[Candidate], rows: int, basis: Literal["estimated", "measured"]) -> float:
    """Return the microseconds of whoever of some accepted candidates is fastest for M = `rows`."""
    return min(time_of(candidate, rows, basis) for candidate in candidates)


def mean_time(candidates: Sequence[Candidate], rows: Sequence[int], basis: Literal["estimated", "measured"]) -> float:
    """Return the geometric mean of `time_of_fastest` over numbers of rows."""
    return exp(sum(log(time_of_fastest(candidates, m, basis)) for m in rows) / len(rows))


def choices(
    candidates: Sequence[Candidate], kernels: Mapping[str, Provided[Kernel]], basis: Literal["estimated", "measured"]
) -> tuple[Choice, ...]:
    """
    Return who is fastest from each number of rows on.

    By measured times, who is so by less than repeats differ is not; a candidate that was not measured plays no part.
    """
    if basis == "measured":
        candidates = [candidate for candidate in candidates if candidate.measured]
        buckets = sorted({rows for candidate in candidates for rows, _ in candidate.measured})
    else:
        buckets = list(ROW_BUCKETS)
    best: list[tuple[int, Candidate]] = []
    for rows in buckets:
        fastest = min(candidates, key=lambda c: (time_of(c, rows, basis), c.kernel))
        if best and basis == "measured":
            before = best[-1][1]
            gains = time_of(fastest, rows, basis) <= (1 - _NOISE) * time_of(before, rows, basis)
            fastest = fastest if gains else before
        if not best or fastest is not best[-1][1]:
            best.append((rows, fastest))
    starts = [0] + [start for start, _ in best[1:]]
    ends = [start - 1 for start in starts[1:]]
    return tuple(
        Choice(candidate.kernel, kernels[candidate.kernel].item.layout_id, start, end)
        for (_, candidate), start, end in zip(best, starts, [*ends, None], strict=True)
    )


def bytes_held(problem: LinearProblem | MoEProblem, candidate: Candidate) -> int:
    """Return the bytes that a candidate holds for a layer, by what it claims; 0 more where it was refused."""
    extra = candidate.verdict.extra_bytes if isinstance(candidate.verdict, Accepted) else 0
    return problem.stored_bytes + extra


def may_join(kernel: Kernel, first: Kernel, platform: Platform) -> bool:
    """Return whether a kernel may serve more rows of a layer: on an accelerator none that would keep it from graphs."""
    return kernel.traits.graph_safe or not first.traits.graph_safe or platform.kind == "cpu"
