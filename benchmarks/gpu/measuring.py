"""
The second phase: one process, one call after the other, everything about one layer and number of rows close together.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.gpu.cases import CUDA
from benchmarks.gpu.checking import Checked, make
from benchmarks.gpu.contenders import Contender, Held
from quantplug.stopwatch import cold_copies, per_call

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterator

    from benchmarks.gpu.cases import Case, Kind
    from benchmarks.gpu.ceilings import Ceilings

_SECONDS = 0.01
"""How long graphs of one contender are replayed, at least; at least three samples, each of 2 ms or longer."""


@dataclass(slots=True)
class Point:
    """
    All figures about one layer and number of rows.

    Attributes:
        kind, format, layer, rows: what was measured.
        roof_us: the larger of reading weights once and of all products at the device's rate.
        us: microseconds of a call, by contender.
        chosen: the kernel that a plan takes, by the way it comes to it (`choice.WAYS`); "" when it takes none. Follows
            from the others, and so is no part of the JSON.
    """

    kind: Kind
    format: str
    layer: str
    rows: int
    roof_us: float
    us: dict[str, float] = field(default_factory=dict)
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
    known: dict[tuple[Hashable, int], float] = {}
    for case in cases:
        running = [(make(r.name, case.kind), r) for r in checked if r.case == case and r.errors]
        layers: dict[str, list[Held]] = {}
        for count in rows[case.kind]:
            point = Point(case.kind, case.format, case.layer, count, limits.roof_us(case, count))
            inputs = case.inputs(count, CUDA)
            for contender, result in running:
                if count not in result.errors:
                    continue
                work = contender.work(case), count
                try:
                    if work not in known:
                        if contender.name not in layers:
                            layers[contender.name] = _copies(contender, case)
                        known[work] = _time(contender, case, inputs, layers[contender.name])
                    point.us[contender.name] = known[work]
                except Exception as error:  # noqa: BLE001  # who breaks must not take the others with it
                    print(f"not measured: {contender.name} for {case.format}, {case.layer}, M = {count}: {error}")
            yield point
        del layers
        torch.cuda.empty_cache()


def _copies(contender: Contender, case: Case) -> list[Held]:
    """Return so many copies of a layer that they are cold when their turn comes."""
    held = contender.prepare(case)
    return [Held(tensors, held.facts) for tensors in cold_copies(held.tensors, CUDA)]


def _time(contender: Contender, case: Case, inputs: list[Any], layers: list[Held]) -> float:
    ready = [contender.ready(given, case) for given in inputs]
    count = max(len(ready), len(layers))
    turns = [(ready[turn % len(ready)], layers[turn % len(layers)]) for turn in range(count)]

    def call(turn: tuple[Any, Held]) -> torch.Tensor:
        return contender.call(*turn, case)

    return per_call(call, turns, CUDA, seconds=_SECONDS)
