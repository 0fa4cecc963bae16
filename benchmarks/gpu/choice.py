"""
What a plan takes for a layer: by what kernels claim, and by the times that were measured, as after `quantplug tune`;
with one layout, and with two where memory allows; and with what is chosen by request only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from benchmarks.gpu.cases import LinearCase
from benchmarks.gpu.experts import ExpertCase
from quantplug.errors import PlanError
from quantplug.inventory import ModuleInfo
from quantplug.platform import Platform
from quantplug.plugins import registry
from quantplug.policy import Policy
from quantplug.secondlayout import second_layout
from quantplug.select import kernels_for, select
from quantplug.timings import Measurement, Timings, problem_key, versions_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from benchmarks.gpu.cases import Case
    from benchmarks.gpu.measuring import Point
    from quantplug.plan import Decision

_BASES = ("estimated", "tuned", "tuned, fast sums")
_TWO = ", two layouts"
WAYS = tuple(f"{basis}{two}" for two in ("", _TWO) for basis in _BASES)
"""How a plan comes to its choice; "fast sums" is a policy that allows what ends in `.fast`."""

_FAST = Policy.parse({"rule": [{"allow": "*.fast"}]}, "benchmark")

_HERE = "the GPU that was measured"


def choose(points: Iterable[Point], platform: str) -> None:
    """Give every point what a plan of this checkout takes on a platform ("cuda:9.0"), in each way."""
    layers: dict[tuple[str, str, str], list[Point]] = {}
    for point in points:
        layers.setdefault((point.kind, point.format, point.layer), []).append(point)
    for some in layers.values():
        for way, decision in _ways(_case_of(some[0]), some, platform).items():
            for point in some:
                point.chosen[way] = decision.at(point.rows)


def _ways(case: Case, points: Sequence[Point], text: str) -> dict[str, Decision]:
    known, parsed, problem = registry(), Platform.parse(text), case.problem
    platform = Platform(parsed.kind, parsed.arch, device=_HERE)
    kernels = kernels_for(problem, known)
    times: dict[str, list[tuple[int, float]]] = {}
    for point in sorted(points, key=lambda point: point.rows):
        for name, us in point.us.items():
            if name in kernels:
                times.setdefault(name, []).append((point.rows, us))
    measured = Timings(
        Measurement(
            _HERE, str(platform), problem_key(problem), name, versions_of(kernels[name].plugin, platform, known),
            tuple(us),
        )
        for name, us in times.items()
    )  # fmt: skip
    found: dict[str, Decision] = {}
    for basis, timings, policy in zip(
        _BASES, (Timings(), measured, measured), (Policy(), Policy(), _FAST), strict=True
    ):
        try:
            decision = select(problem, ModuleInfo("layer", case.kind), platform, known, policy, {}, timings)
        except PlanError:
            continue  # nobody runs it
        second = second_layout(problem, decision, platform, known)
        found |= {basis: decision, basis + _TWO: decision if second is None else second.decision}
    return found


def _case_of(point: Point) -> Case:
    if point.kind == "experts":
        return ExpertCase(point.format, point.layer)
    n, k = point.layer.split(" x ")
    return LinearCase(point.format, int(n), int(k))
