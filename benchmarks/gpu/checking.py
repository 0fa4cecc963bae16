"""
The first phase: every contender prepares every layer, compiles what it needs and is held against a float32 product.

Several processes do this at once; nothing is timed. What was compiled lies in caches on disk, for the second phase.
"""

from __future__ import annotations

import os
import time
import traceback
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.gpu.cases import CUDA
from benchmarks.gpu.contenders import Contender, Held, OurExperts, Ours
from benchmarks.gpu.peers import PEERS
from benchmarks.gpu.processes import in_processes

if TYPE_CHECKING:
    from collections.abc import Hashable

    from benchmarks.gpu.cases import Case, Kind

LARGEST_ERROR = 1e-2
"""Of the norm of the difference, over that of the product: far above what is right; the tests are the strict ones."""

LARGEST_ERROR_TWICE = 3e-2
"""
The same where what lies between two products is quantized: what was rounded to bfloat16 before may fall to the next of
a float8's codes, one in a hundred does, and a step is an eighth of it.
"""


@dataclass(slots=True)
class Checked:
    """
    What became of one contender on one layer.

    Attributes:
        name: the contender's.
        case: the layer.
        refused: why it does not run it, or what went wrong; "" when it does.
        errors: by number of rows, relative to the norm of the product.
        seconds: it took.
    """

    name: str
    case: Case
    refused: str = ""
    errors: dict[int, float] = field(default_factory=dict)
    seconds: float = 0.0


_LONG_SECONDS = 10.0
"""A check that takes longer is mentioned."""

Task = tuple[str, "Case", tuple[int, ...]]
"""A contender by name, a layer, and numbers of rows."""


def make(name: str, kind: Kind) -> Contender:
    """Return a contender by name."""
    for maker in PEERS:
        peer = maker()
        if peer.name == name and peer.kind == kind:
            return peer
    return Ours(name) if kind == "linear" else OurExperts(name)


def tasks_of(contenders: list[Contender], cases: list[Case], rows: dict[Kind, tuple[int, ...]]) -> list[Task]:
    """Return what is to be checked: what takes long to compile first, then by size, so that nobody is last alone."""
    found = [
        (contender.slow_to_compile, case.weights, (contender.name, case, asked))
        for case in cases
        for contender in contenders
        if contender.kind == case.kind and contender.concerns(case) and (asked := contender.rows(rows[case.kind], case))
    ]
    return [task for *_, task in sorted(found, key=lambda each: each[:2], reverse=True)]


def check_all(tasks: list[Task], seconds: float) -> list[Checked]:
    """Check contenders on layers, in as many processes as there are processors; what takes too long is given up."""
    works = [make(name, case.kind).work(case) for name, case, _ in tasks]
    first: dict[Hashable, Task] = {}
    for work, task in zip(works, tasks, strict=True):
        first.setdefault(work, task)
    workers = max(1, (os.cpu_count() or 4) - 2)
    found = in_processes(_check, _usable, list(first.values()), workers=workers, seconds=seconds)
    done = {
        work: result if isinstance(result, Checked) else Checked(*task[:2], refused=result)
        for (work, task), result in zip(first.items(), found, strict=True)
    }
    return [replace(done[work], case=case) for work, (_, case, _) in zip(works, tasks, strict=True)]


def refusals_of(checked: list[Checked]) -> list[str]:
    """Return a line for each contender and reason, and the layers that it is about unless it is about all."""
    layers: dict[tuple[str, str], list[str]] = {}
    for result in checked:
        if result.refused:
            layers.setdefault((result.name, result.refused), []).append(f"{result.case.format}, {result.case.layer}")
    every = Counter(result.name for result in checked)
    return [
        f"{name}: {refused}" + ("" if len(where) == every[name] else f" ({'; '.join(where)})")
        for (name, refused), where in layers.items()
    ]


def _check(task: Task) -> Checked:
    name, case, rows = task
    result = Checked(name, case)
    started = time.monotonic()
    torch.set_num_threads(2)
    try:
        contender = make(name, case.kind)
        result.refused = contender.refuses(case)
        if not result.refused:
            held = contender.prepare(case)
            for count in rows:
                _compare(contender, held, case, count, result)
    except Exception as error:  # noqa: BLE001  # a contender that breaks must not take the others with it
        result.refused = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:200]
        traceback.print_exc()
    if _usable():
        torch.cuda.empty_cache()
    result.seconds = time.monotonic() - started
    if result.seconds > _LONG_SECONDS:
        print(f"{name}, {case.format}, {case.layer}: checked in {result.seconds:.0f} s", flush=True)
    return result


def _usable() -> bool:
    """Return whether this process can still use the GPU, which a kernel that breaks takes from it."""
    try:
        torch.zeros(1, device=CUDA).item()
    except RuntimeError:
        return False
    return True


def _compare(contender: Contender, held: Held, case: Case, count: int, result: Checked) -> None:
    """Note the error for a number of rows; a wrong one is not measured, and neither are more rows."""
    if result.refused:
        return
    given: Any = case.inputs(count, CUDA)[0]
    y = contender.call(contender.ready(given, case), held, case)
    quantized = contender.quantizes_x(case)
    some, wanted = case.right(given, quantized=quantized)
    error = float((y[some].to(torch.float32) - wanted).norm() / wanted.norm())
    result.errors[count] = error
    most = LARGEST_ERROR_TWICE if quantized and case.kind == "experts" else LARGEST_ERROR
    if not error < most:
        del result.errors[count]
        result.refused = f"wrong for {count} rows: relative error {error:.2g}"
