"""
The second phase: one process, and everything about one layer and number of rows in turns.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from math import nan
from statistics import median
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.gpu.cases import CUDA
from benchmarks.gpu.checking import Checked, make
from benchmarks.gpu.contenders import Contender, Held
from benchmarks.gpu.hostcost import SERIES, is_enqueued, series_us
from quantplug.stopwatch import cold_copies, in_turns, sampler

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterator

    from benchmarks.gpu.cases import Case, Kind
    from benchmarks.gpu.ceilings import Ceilings
    from quantplug.stopwatch import Sampler

    Work = tuple[Hashable, int]
    """What a call computes, and for how many rows: see `Contender.work`."""

_SECONDS = 0.01
"""How long a contender is measured, about."""
_ROUNDS = 5
"""How many samples of each contender count, at least."""


@dataclass(slots=True)
class Point:
    """
    All figures about one layer and number of rows.

    Attributes:
        kind, format, layer, rows: what was measured.
        roof_us: the larger of reading weights once and of all products at the device's rate.
        us: microseconds of a call, by contender: the median of its rounds.
        rounds: the same, round by round.
        host_us: microseconds that the host takes to enqueue a call, by contender; where that is measured.
        refused: what went wrong while a contender was measured here, by its name.
        chosen: the kernel that a plan takes, by the way it comes to it (`choice.WAYS`); "" when it takes none. Follows
            from the others, and so is no part of the JSON.
    """

    kind: Kind
    format: str
    layer: str
    rows: int
    roof_us: float
    us: dict[str, float] = field(default_factory=dict)
    rounds: dict[str, list[float]] = field(default_factory=dict)
    host_us: dict[str, float] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    chosen: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return it as plain JSON."""
        found = asdict(self)
        del found["chosen"]
        return found


def measure(
    checked: list[Checked], cases: list[Case], rows: dict[Kind, tuple[int, ...]], limits: Ceilings
) -> Iterator[Point]:
    """Yield a point for each layer and number of rows, in the order of layers."""
    known: dict[Work, list[float]] = {}
    enqueued: dict[Work, float] = {}
    for case in cases:
        running = [(make(r.name, case.kind), r) for r in checked if r.case == case and r.errors]
        layers = _Layers(case)
        for count in rows[case.kind]:
            point = Point(case.kind, case.format, case.layer, count, limits.roof_us(case, count))
            works = {each: (each.work(case), count) for each, result in running if count in result.errors}
            known |= _rounds({each: work for each, work in works.items() if work not in known}, point, layers)
            point.rounds = {each.name: known[work] for each, work in works.items() if work in known}
            point.us = {name: median(us) for name, us in point.rounds.items()}
            if is_enqueued(case, count):
                enqueued |= _enqueued(
                    {each: work for each, work in works.items() if work not in enqueued}, point, layers
                )
                point.host_us = {each.name: enqueued[work] for each, work in works.items() if work in enqueued}
            yield point
        del layers
        torch.cuda.empty_cache()


class _Layers:
    """A layer as contenders hold it, each from when it is first asked: copies, so many that they are cold in turns."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self._held: dict[str, list[Held]] = {}

    def of(self, contender: Contender) -> list[Held]:
        """Return the copies."""
        if contender.name not in self._held:
            held = contender.prepare(self.case)
            self._held[contender.name] = [Held(some, held.facts) for some in cold_copies(held.tensors, CUDA)]
        return self._held[contender.name]


def _rounds(works: dict[Contender, Work], point: Point, layers: _Layers) -> dict[Work, list[float]]:
    """Return the microseconds of contenders that take turns; what all of them captured is let go of then."""
    inputs = layers.case.inputs(point.rows, CUDA)
    samplers: dict[Work, Sampler] = {}
    for contender, work in works.items():
        with _without_who_breaks(contender, point):
            samplers[work] = _guarded(_sampler(contender, inputs, layers), contender, point)
    return _samples(samplers, works, point, fewest=_ROUNDS)


def _sampler(contender: Contender, inputs: list[Any], layers: _Layers) -> Sampler:
    case = layers.case
    ready, copies = [contender.ready(given, case) for given in inputs], layers.of(contender)
    count = max(len(ready), len(copies))
    turns = [(ready[turn % len(ready)], copies[turn % len(copies)]) for turn in range(count)]

    def call(turn: tuple[Any, Held]) -> torch.Tensor:
        return contender.call(*turn, case)

    return sampler(call, turns, CUDA)


def _enqueued(works: dict[Contender, Work], point: Point, layers: _Layers) -> dict[Work, float]:
    """Return the microseconds that the host takes for a call of each contender, in turns, too."""
    given = layers.case.inputs(point.rows, CUDA)[0]
    samplers: dict[Work, Sampler] = {}
    for contender, work in works.items():
        if contender.role != "informative":
            with _without_who_breaks(contender, point):
                call = contender.bound(contender.ready(given, layers.case), layers.of(contender)[0], layers.case)
                call()
                samplers[work] = _guarded(partial(series_us, call), contender, point)
    return {work: min(us) for work, us in _samples(samplers, works, point, fewest=SERIES).items()}


def _guarded(sample: Sampler, contender: Contender, point: Point) -> Sampler:
    """Return a sampler that gives NaN from when a contender breaks on, which then is not called again."""

    def guarded() -> float:
        if contender.name not in point.refused:
            with _without_who_breaks(contender, point):
                return sample()
        return nan

    return guarded


def _samples(
    samplers: dict[Work, Sampler], works: dict[Contender, Work], point: Point, *, fewest: int
) -> dict[Work, list[float]]:
    """Return what samplers that take turns give, without those of who broke meanwhile."""
    found = dict(zip(samplers, in_turns(list(samplers.values()), seconds=_SECONDS, fewest=fewest), strict=True))
    broken = {work for contender, work in works.items() if contender.name in point.refused}
    return {work: us for work, us in found.items() if work not in broken}


@contextmanager
def _without_who_breaks(contender: Contender, point: Point) -> Iterator[None]:
    """Keep who breaks, and why, and go on with the others."""
    try:
        yield
    except Exception as error:  # noqa: BLE001  # who breaks must not take the others with it
        point.refused[contender.name] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        print(f"not measured: {broken_at(point)[-1]}")


def broken_at(point: Point) -> list[str]:
    """Return a line for each contender that broke while it was measured."""
    where = f"{point.format}, {point.layer}, M = {point.rows}"
    return [f"{name}: {reason} ({where})" for name, reason in point.refused.items()]
