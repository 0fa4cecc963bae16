"""
The tables: what a plan takes and our fastest kernel beside the best peer, bfloat16 and the roof. All are Markdown.

A peer multiplies the same quantized weights. bfloat16 on a copy that was dequantized once for all is a reference beside
them: it holds two to four times the memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, exp, log
from statistics import median
from typing import TYPE_CHECKING

from benchmarks.gpu.choice import WAYS

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from benchmarks.gpu.measuring import Point

LIMIT = 1.05
"""Times the best peer's time: what no point should exceed."""


@dataclass(frozen=True, slots=True)
class Names:
    """Who is who: our kernels, peers, and bfloat16 of either kind of layer."""

    ours: tuple[str, ...]
    peers: tuple[str, ...]
    references: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Best:
    """The fastest of some contenders."""

    name: str
    us: float


def best(point: Point, names: Iterable[str]) -> Best | None:
    """Return who is fastest of some contenders; None when none of them ran."""
    there = [(point.us[name], name) for name in names if name in point.us]
    return Best(min(there)[1], min(there)[0]) if there else None


def ratio(mine: Best | None, theirs: Best | None) -> float | None:
    """Return one time over another; None where either did not run."""
    return mine.us / theirs.us if mine and theirs else None


def spelled(value: float | None, digits: int = 2) -> str:
    """Return a number, or "-" for None."""
    return "-" if value is None else f"{value:.{digits}f}"


def progress(point: Point, names: Names) -> str:
    """Return a line for somebody who waits."""
    fastest, peer, dense = (best(point, who) for who in (names.ours, names.peers, names.references))
    parts = [
        f"{who} {found.name} {found.us:.1f}" for who, found in (("ours", fastest), ("peer", peer), ("", dense)) if found
    ]
    parts += [f"roof {point.roof_us:.1f}", f"ratio {spelled(ratio(fastest, peer))}"]
    return f"{point.format}, {point.layer}, M = {point.rows}: {', '.join(part.strip() for part in parts)}"


def labels(names: Sequence[str]) -> dict[str, str]:
    """Return a short label for each name: its first letter, then "d" for `.dense`; numbered where two are alike."""
    found: dict[str, str] = {}
    for name in names:
        label = name[0] + "d" * name.endswith(".dense")
        taken = sum(other.rstrip("0123456789") == label for other in found.values())
        found[name] = label + (str(taken + 1) if taken else "")
    return found


def legend(points: Sequence[Point], names: Names) -> str:
    """Return what the labels of the kernels stand for that are fastest somewhere."""
    short = labels(names.ours)
    used = {found.name for point in points if (found := best(point, names.ours))}
    return ", ".join(f"{short[name]} `{name}`" for name in names.ours if name in used)


def compact(points: Sequence[Point], names: Names) -> list[str]:
    """Return a line for each layer: our fastest kernel's microseconds, over the best peer, and bfloat16 over it."""
    rows = list(dict.fromkeys(point.rows for point in points))
    lines = [f"| format | layer | {' | '.join(f'M = {count}' for count in rows)} |", "|---" * (2 + len(rows)) + "|"]
    short = labels(names.ours)
    layers: dict[tuple[str, str], dict[int, str]] = {}
    for point in points:
        mine, peer, dense = (best(point, who) for who in (names.ours, names.peers, names.references))
        cell = f"{mine.us:.1f} {short[mine.name]}" if mine else "-"
        cell += f" ({spelled(ratio(mine, peer))}, {spelled(ratio(dense, mine), 1)}x)"
        layers.setdefault((point.format, point.layer), {})[point.rows] = cell
    for (kind, layer), cells in layers.items():
        lines.append(f"| {kind} | {layer} | {' | '.join(cells.get(count, '-') for count in rows)} |")
    return lines


def summary(points: Sequence[Point], names: Names) -> list[str]:
    """Return, by format and in all, what is chosen and our fastest over the best peer, and bfloat16 over that."""
    columns = ("format", "points", *WAYS, "fastest", "bfloat16 / fastest", "roof / fastest")
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    formats = list(dict.fromkeys(point.format for point in points))
    for name in [*formats, "all"] if len(formats) > 1 else formats:
        some = [point for point in points if name in ("all", point.format)]
        cells = [name, str(len(some))]
        for way in WAYS:
            pairs = [(ratio(best(p, [p.chosen.get(way, "")]), best(p, names.peers)), p) for p in some]
            cells.append(_spread(pairs))
        cells.append(_spread([(ratio(best(p, names.ours), best(p, names.peers)), p) for p in some]))
        cells.append(_mean([ratio(best(p, names.references), best(p, names.ours)) for p in some]))
        cells.append(_mean([p.roof_us / mine.us for p in some if (mine := best(p, names.ours))]))
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def above(points: Sequence[Point], names: Names, way: str) -> list[str]:
    """Return a line for each point where what a plan takes in one of `WAYS` is above the limit; worst first."""
    columns = ("format", "layer", "M", way, "us", "our fastest", "us", "best peer", "us", "ratio")
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    found = []
    for point in points:
        chosen, mine, peer = (
            best(point, [point.chosen.get(way, "")]),
            best(point, names.ours),
            best(point, names.peers),
        )
        times = ratio(chosen, peer)
        if times is not None and times > LIMIT:
            cells = [point.format, point.layer, str(point.rows)]
            for who in (chosen, mine, peer):
                cells += [who.name, f"{who.us:.1f}"] if who else ["-", "-"]
            found.append((times, f"| {' | '.join(cells)} | {times:.2f} |"))
    return [*lines, *(line for _, line in sorted(found, key=lambda each: -each[0]))]


def everyone(points: Sequence[Point]) -> list[str]:
    """Return every contender's microseconds, a line for each layer and contender, and the roof."""
    rows = list(dict.fromkeys(point.rows for point in points))
    lines = [f"| layer | contender | {' | '.join(f'M = {count}' for count in rows)} |", "|---" * (2 + len(rows)) + "|"]
    layers: dict[tuple[str, str], list[Point]] = {}
    for point in points:
        layers.setdefault((point.format, point.layer), []).append(point)
    for (kind, layer), some in layers.items():
        who = dict.fromkeys(name for point in some for name in point.us)
        for name in ["roof", *who]:
            at = {point.rows: point.roof_us if name == "roof" else point.us.get(name) for point in some}
            lines.append(f"| {kind}, {layer} | {name} | {' | '.join(spelled(at.get(m), 1) for m in rows)} |")
    return lines


def host(points: Sequence[Point], names: Names) -> list[str]:
    """Return what a call costs the host, a line for each contender; a cell has a figure for each number of rows."""
    some = [point for point in points if point.host_us]
    formats = list(dict.fromkeys(point.format for point in some))
    rows = list(dict.fromkeys(point.rows for point in some))
    lines = [f"| contender | {' | '.join(formats)} |", "|---" * (1 + len(formats)) + "|"]
    at = {(point.format, point.rows): point.host_us for point in some}
    for name in (*names.ours, *names.peers, *names.references):
        figures = {kind: [at.get((kind, count), {}).get(name) for count in rows] for kind in formats}
        cells = [" / ".join(spelled(us, 1) for us in each) if any(each) else "-" for each in figures.values()]
        if any(cell != "-" for cell in cells):
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def repeats(points: Sequence[Point]) -> str:
    """Return a sentence about what repeats differ by; "" where nothing was repeated."""
    # What is measured once is there for several formats.
    rounds = {tuple(us) for point in points for us in point.rounds.values() if len(us) > 1}
    if not rounds:
        return ""
    ranges = sorted(100 * (max(us) - min(us)) / median(us) for us in rounds)
    most = ranges[ceil(0.95 * len(ranges)) - 1]
    return (
        f"Each figure is a median of rounds, whose lowest and highest are {median(ranges):.1f} % of it apart (median "
        f"of {len(ranges)} figures; for 95 % of them at most {most:.1f} %)."
    )


def _mean(ratios: Iterable[float | None]) -> str:
    there = [value for value in ratios if value is not None]
    return f"{exp(sum(map(log, there)) / len(there)):.3f}" if there else "-"


def _spread(pairs: Iterable[tuple[float | None, Point]]) -> str:
    """Return the geometric mean of ratios, the worst and where it is, and how many are above the limit."""
    there = [(value, point) for value, point in pairs if value is not None]
    if not there:
        return "-"
    worst, point = max(there, key=lambda pair: pair[0])
    beyond = sum(value > LIMIT for value, _ in there)
    mean = _mean([value for value, _ in there])
    return f"{mean}, worst {worst:.2f} ({point.layer}, M = {point.rows}), {beyond} of {len(there)} above {LIMIT}"
