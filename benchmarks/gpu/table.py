"""
The table: for each layer and number of rows the kernel that a plan takes, our fastest one, the fastest peer, the roof.
"""

from __future__ import annotations

from math import exp, log
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from benchmarks.gpu.measuring import Point

_COLUMNS = (
    "format", "N x K", "M", "chosen", "us", "our fastest", "us", "best peer", "us", "chosen / peer", "fastest / peer",
    "roof / fastest",
)  # fmt: skip
HEADER = (f"| {' | '.join(_COLUMNS)} |", "|---" * len(_COLUMNS) + "|")


def best(point: Point, names: Iterable[str]) -> tuple[str, float] | None:
    """Return who is fastest of some contenders, and the microseconds; None when none of them ran."""
    there = [(point.us[name], name) for name in names if name in point.us]
    return (min(there)[1], min(there)[0]) if there else None


def row(point: Point, ours: Sequence[str], peers: Sequence[str]) -> str:
    """Return one line of the table."""
    chosen = best(point, [point.chosen])
    fastest, peer = best(point, ours), best(point, peers)
    cells = [point.format, f"{point.n} x {point.k}", str(point.rows), point.chosen or "-", _us(chosen)]
    cells += [fastest[0] if fastest else "-", _us(fastest), peer[0] if peer else "-", _us(peer)]
    cells += [_ratio(chosen, peer), _ratio(fastest, peer)]
    cells += [f"{point.roof_us / fastest[1]:.2f}" if fastest else "-"]
    return f"| {' | '.join(cells)} |"


def summary(points: Sequence[Point], ours: Sequence[str], peers: Sequence[str]) -> list[str]:
    """Return the geometric means of the ratios to the best peer, by format and in all, and the worst of each."""
    lines = ["| format | points | chosen / peer: mean, worst | fastest / peer: mean, worst |", "|---|---|---|---|"]
    formats = list(dict.fromkeys(point.format for point in points))
    for name in [*formats, "all"]:
        some = [point for point in points if name in ("all", point.format)]
        columns = []
        for who in ("chosen", "fastest"):
            ratios = []
            for point in some:
                mine = best(point, [point.chosen] if who == "chosen" else ours)
                theirs = best(point, peers)
                if mine and theirs:
                    ratios.append((mine[1] / theirs[1], point))
            columns.append(_spread(ratios))
        lines.append(f"| {name} | {len(some)} | {columns[0]} | {columns[1]} |")
    return lines


def compact(points: Sequence[Point], ours: Sequence[str], peers: Sequence[str]) -> list[str]:
    """Return a table with a line for each layer: of our fastest kernel the microseconds, and over the best peer's."""
    rows = list(dict.fromkeys(point.rows for point in points))
    lines = [f"| format | N x K | {' | '.join(f'M = {count}' for count in rows)} |", "|---" * (2 + len(rows)) + "|"]
    layers: dict[tuple[str, int, int], dict[int, str]] = {}
    for point in points:
        mine, theirs = best(point, ours), best(point, peers)
        cell = f"{mine[1]:.1f} {mine[0].partition('.')[0]}" if mine else "-"
        if mine and mine[0].endswith(".dense"):
            cell += ".dense"
        layers.setdefault((point.format, point.n, point.k), {})[point.rows] = f"{cell} ({_ratio(mine, theirs)})"
    for (kind, n, k), cells in layers.items():
        lines.append(f"| {kind} | {n} x {k} | {' | '.join(cells.get(count, '-') for count in rows)} |")
    return lines


def everyone(points: Sequence[Point], names: Sequence[str]) -> list[str]:
    """Return a table of every contender's microseconds, one line for each layer and number of rows."""
    lines = [f"| format | N x K | M | {' | '.join(names)} |", "|---" * (3 + len(names)) + "|"]
    for point in points:
        cells = [f"{point.us[name]:.1f}" if name in point.us else "-" for name in names]
        lines.append(f"| {point.format} | {point.n} x {point.k} | {point.rows} | {' | '.join(cells)} |")
    return lines


def _us(found: tuple[str, float] | None) -> str:
    return f"{found[1]:.1f}" if found else "-"


def _ratio(mine: tuple[str, float] | None, theirs: tuple[str, float] | None) -> str:
    return f"{mine[1] / theirs[1]:.2f}" if mine and theirs else "-"


def _spread(ratios: list[tuple[float, Point]]) -> str:
    if not ratios:
        return "-"
    mean = exp(sum(log(ratio) for ratio, _ in ratios) / len(ratios))
    worst, point = max(ratios, key=lambda pair: pair[0])
    return f"{mean:.3f}, {worst:.2f} ({point.n} x {point.k}, M = {point.rows})"
