"""
One kernel on one problem of made-up operands: is its result right, and how long does it take.

This is no proof that a kernel is right, which is what the testkit's conformance kit is for. It finds what goes wrong on
this very machine at this very size, before a measured time makes a plan prefer it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch

from quantplug.asking import split
from quantplug.isolation import Fault, isolated
from quantplug.samples import dense_values, sample_activation, sample_weights, sample_x
from quantplug.stopwatch import cold_copies, per_call
from quantplug.trialbound import Exact
from quantplug.weight import Prepared

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from quantplug.kernel import Accepted, LinearKernel
    from quantplug.spec import LinearProblem

DISTINCT_ROWS = 13
"""Rows of x that are held against the exact result; x repeats them. A prime, so that no tile is as long."""


@dataclass(frozen=True, slots=True)
class Trial:
    """
    What came of it.

    Attributes:
        us: (rows M, median microseconds) by rising rows; () when something was wrong, or memory did not suffice.
        nbytes: bytes that the kernel holds.
        wrong: what was wrong, or "".
    """

    us: tuple[tuple[int, float], ...] = ()
    nbytes: int = 0
    wrong: str = ""


class Workload:
    """
    A problem with operands, on which kernels take their turn.

    Args:
        problem: what is to run.
        device: where.
        rows: numbers of rows M, rising.
        seconds: how long each number of rows is measured, about.
    """

    def __init__(self, problem: LinearProblem, device: torch.device, rows: Sequence[int], seconds: float) -> None:
        generator = torch.Generator().manual_seed(0)
        self.problem = problem
        self._device = device
        self._rows = rows
        self._seconds = seconds
        self._weights = sample_weights(problem, generator)
        dtype: torch.dtype = getattr(torch, problem.dtype)
        self._values = dense_values(self._weights, device)
        self._bias = torch.randn(problem.out_features, generator=generator).to(device, dtype) if problem.bias else None
        self._checked = sample_x(problem, DISTINCT_ROWS, generator).to(device)
        self._exact = Exact(self._checked, self._values, self._weights, self._bias)
        self._x = torch.randn(max(rows), problem.in_features, generator=generator).to(device, dtype)

    def dense(self) -> Trial:
        """Time torch's own product with the values in the dtype of x: the yardstick."""
        weight = self._values.to(self._x.dtype)
        turns = cold_copies({"weight": weight}, self._device)

        def call(turn: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.linear(x, turn["weight"], self._bias)

        times = [
            (m, per_call(partial(call, x=self._x[:m]), turns, self._device, seconds=self._seconds)) for m in self._rows
        ]
        return Trial(tuple(times), weight.nbytes)

    def run(self, kernel: LinearKernel, verdict: Accepted) -> Trial:
        """Prepare, check and time a kernel, which accepted the problem with that verdict."""
        return tried(lambda: self._run(kernel, verdict))

    def touch(self) -> None:
        """Use the device; raises when it cannot be used any more."""
        float(self._checked[0, 0] + 1)

    def _run(self, kernel: LinearKernel, verdict: Accepted) -> Trial:
        whole = self.problem.uniform or not kernel.traits.uniform_segments
        problems = [self.problem] if whole else list(split(self.problem))
        groups = [self._weights] if whole else [[weight] for weight in self._weights]
        biases = self._biases(problems)
        parts: list[Prepared] = []
        for problem, weights in zip(problems, groups, strict=True):
            stored = [sample_activation(problem.activation)] * len(weights)
            parts.append(kernel.prepare(problem, weights, stored, self._device))

        def call(parts: Sequence[Prepared], x: torch.Tensor) -> torch.Tensor:
            results = [kernel.apply(x, part, bias) for part, bias in zip(parts, biases, strict=True)]
            return results[0] if len(results) == 1 else torch.cat(results, dim=-1)

        for rows in self._rows:
            x = self._checked[torch.arange(rows, device=self._device) % DISTINCT_ROWS]
            wrong = self._exact.compare(call(parts, x), verdict.casts)
            if wrong:
                return Trial(nbytes=_nbytes(parts), wrong=wrong)
        turns = [list(turn) for turn in zip(*(self._copies(part) for part in parts), strict=True)]
        times = [
            (m, per_call(
                partial(call, x=self._x[:m]), turns, self._device, seconds=self._seconds, graph=kernel.traits.graph_safe
            ))
            for m in self._rows
        ]  # fmt: skip
        return Trial(tuple(times), _nbytes(parts))

    def _biases(self, problems: Sequence[LinearProblem]) -> list[torch.Tensor | None]:
        if self._bias is None:
            return [None] * len(problems)
        return list(self._bias.split([problem.out_features for problem in problems]))

    def _copies(self, part: Prepared) -> list[Prepared]:
        return [
            Prepared(part.layout_id, part.problem, tensors, part.meta)
            for tensors in cold_copies(part.tensors, self._device)
        ]


def tried(run: Callable[[], Trial]) -> Trial:
    """Return what came of a trial; what a kernel raises is wrong, but where memory did not suffice."""
    found = isolated(run)
    if isinstance(found, Fault):
        return Trial() if found.error.startswith("OutOfMemoryError") else Trial(wrong=f"raised {found.error}")
    return found


def _nbytes(parts: Sequence[Prepared]) -> int:
    return sum(part.nbytes for part in parts)
