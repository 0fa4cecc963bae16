"""
What a run found, as JSON and as tables: `python -m benchmarks.gpu.report FILE.json` prints them again, and with
`--into README.md` those of README.md are put in place of the ones that are there. The figures are the run's; what a
plan takes is asked again, so that it is this checkout's.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.gpu.choice import WAYS, choose
from benchmarks.gpu.measuring import Point, broken_at
from benchmarks.gpu.table import LIMIT, Names, above, compact, everyone, host, legend, repeats, summary

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benchmarks.gpu.cases import Kind

BEGIN, END = "<!-- figures -->", "<!-- end of figures -->"
"""Between these README.md has its tables."""

_LISTED = ("tuned", WAYS[-1])
"""Ways to a choice whose points above the limit are told one by one: after `quantplug tune`, and the best."""

_TITLES: dict[Kind, str] = {"linear": "Linear layers", "experts": "Experts"}


@dataclass(slots=True)
class Report:
    """
    Everything that a run found.

    Attributes:
        machine: what it ran on, in a line.
        platform: the same as plans spell it ("cuda:9.0").
        names: who took part, by kind of layer.
        points: figures.
        refusals: who did not run what, and why; who broke while it was measured is said by points.
    """

    machine: str
    platform: str
    names: dict[Kind, Names]
    points: list[Point]
    refusals: list[str]

    def write(self, file: Path) -> None:
        """Write it as JSON."""
        whole = {
            "machine": self.machine,
            "platform": self.platform,
            "names": {kind: asdict(names) for kind, names in self.names.items()},
            "points": [point.to_json() for point in self.points],
            "refusals": self.refusals,
        }
        file.write_text(json.dumps(whole, indent=1))


def read(file: Path) -> Report:
    """Return what `Report.write` wrote."""
    whole = json.loads(file.read_text())
    names = {kind: Names(**{role: tuple(who) for role, who in by.items()}) for kind, by in whole["names"].items()}
    points = [Point(**point) for point in whole["points"]]
    return Report(whole["machine"], whole["platform"], names, points, whole["refusals"])


def markdown(report: Report, *, whole: bool) -> list[str]:
    """Return the tables of README.md; `whole` with everyone's figures, which are many."""
    lines = [" ".join(filter(None, (report.machine, repeats(report.points))))]
    for kind, title in _TITLES.items():
        points = [point for point in report.points if point.kind == kind]
        if points:
            lines += ["", f"### {title}", "", *_section(points, report.names[kind])]
            lines += ["", "Everyone, microseconds:", "", *everyone(points)] if whole else []
        if any(point.host_us for point in points):
            lines += ["", "### Host cost per call", "", *_host(points, report.names[kind])]
    refusals = [*report.refusals, *(line for point in report.points for line in broken_at(point))]
    if refusals:
        lines += ["", "Not run:", "", *(f"- {line}" for line in refusals)]
    return lines


def put(text: str, lines: Sequence[str]) -> str:
    """
    Return a text with lines in place of those between its two marks.

    Raises:
        ValueError: a mark is missing.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"the file lacks {BEGIN if not begin else END}")
    return "\n".join([before + begin, *lines, end + after])


def _section(points: Sequence[Point], names: Names) -> list[str]:
    lines = [
        "Microseconds of our fastest kernel; in brackets its time over that of the best peer (below 1 is faster than "
        "any) and how many times faster it is than bfloat16.",
        f"{legend(points, names)}.",
        "",
        *compact(points, names),
        "",
        "Geometric means, the worst point, and points above the limit:",
        "",
        *summary(points, names),
    ]
    for way in _LISTED:
        lines += ["", f"What a plan takes ({way}), and is above {LIMIT} times the best peer:", ""]
        lines += above(points, names, way)
    return lines


def _host(points: Sequence[Point], names: Names) -> list[str]:
    rows = dict.fromkeys(str(point.rows) for point in points if point.host_us)
    layers = dict.fromkeys(point.layer for point in points if point.host_us)
    where = f"{', '.join(layers)}, M = {' / '.join(rows)}"
    return [
        f"Microseconds of the host until a call is enqueued, without a graph: {where}.",
        "",
        *host(points, names),
    ]


def main() -> None:
    """Print the tables of a file, or put them into another."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.report", description=__doc__)
    parser.add_argument("file", type=Path, help="what `python -m benchmarks.gpu --json` wrote")
    parser.add_argument("--into", type=Path, metavar="README.md", help="put the tables between the marks of this file")
    options = parser.parse_args()
    report = read(options.file)
    choose(report.points, report.platform)
    if options.into is None:
        print(*markdown(report, whole=True), sep="\n")
    else:
        options.into.write_text(put(options.into.read_text(), markdown(report, whole=False)))


if __name__ == "__main__":
    main()
