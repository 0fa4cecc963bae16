"""
What a run found, as JSON and as the tables of README.md: `python -m benchmarks.gpu.report FILE.json` prints them again.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.gpu.measuring import Point
from benchmarks.gpu.table import LIMIT, Names, above, compact, everyone, legend, summary

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benchmarks.gpu.cases import Kind

_TITLES: dict[Kind, str] = {"linear": "Linear layers", "experts": "Experts"}


@dataclass(frozen=True, slots=True)
class Report:
    """
    Everything that a run found.

    Attributes:
        machine: what it ran on, in a line.
        names: who took part, by kind of layer.
        points: figures.
        refusals: who did not run what, and why.
    """

    machine: str
    names: dict[Kind, Names]
    points: list[Point]
    refusals: list[str]

    def write(self, file: Path) -> None:
        """Write it as JSON."""
        whole = {
            "machine": self.machine,
            "names": {kind: asdict(names) for kind, names in self.names.items()},
            "points": [point.to_json() for point in self.points],
            "refusals": self.refusals,
        }
        file.write_text(json.dumps(whole, indent=1))


def read(file: Path) -> Report:
    """Return what `Report.write` wrote."""
    whole = json.loads(file.read_text())
    names = {kind: Names(**{role: tuple(who) for role, who in by.items()}) for kind, by in whole["names"].items()}
    return Report(whole["machine"], names, [Point(**point) for point in whole["points"]], whole["refusals"])


def markdown(report: Report) -> list[str]:
    """Return the tables of README.md."""
    lines = [report.machine]
    for kind, title in _TITLES.items():
        points = [point for point in report.points if point.kind == kind]
        if points:
            lines += ["", f"### {title}", "", *_section(points, report.names[kind])]
    if report.refusals:
        lines += ["", "Not run:", "", *(f"- {line}" for line in report.refusals)]
    return lines


def _section(points: Sequence[Point], names: Names) -> list[str]:
    return [
        "Microseconds of our fastest kernel; in brackets its time over that of the best peer (below 1 is faster than "
        "any) and how many times faster it is than bfloat16.",
        f"{legend(points, names)}.",
        "",
        *compact(points, names),
        "",
        "Geometric means, the worst point, and points above the limit:",
        "",
        *summary(points, names),
        "",
        f"What a plan takes with two layouts and is above {LIMIT} times the best peer:",
        "",
        *above(points, names),
        "",
        "Everyone, microseconds:",
        "",
        *everyone(points),
    ]


def main() -> None:
    """Print the tables of a file."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.report", description=__doc__)
    parser.add_argument("file", type=Path, help="what `python -m benchmarks.gpu --json` wrote")
    print(*markdown(read(parser.parse_args().file)), sep="\n")


if __name__ == "__main__":
    main()
