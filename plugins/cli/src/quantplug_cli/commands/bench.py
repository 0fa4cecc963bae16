"""
`quantplug bench`: how fast each installed kernel is, beside what the machine could do.
"""

from __future__ import annotations

import json
import re
from itertools import groupby
from math import exp, fsum, log
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quantplug_cli.drawing import draw, require_matplotlib
from quantplug_cli.options import AsJson, Dtype, Rows, Settings, read_rows, read_settings

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from quantplug.benching import Case
    from quantplug.benchreport import BenchReport, Comparison, Point

_SHAPE = re.compile(r"([1-9]\d{0,8})x([1-9]\d{0,8})")
_SECONDS, _QUICK_SECONDS = 0.2, 0.05
_NOISE = 0.03

OptionalCheckpoint = Annotated[
    str | None, typer.Argument(metavar="CKPT", help="Measure the distinct layers of a checkpoint, not --format.")
]
Shapes = Annotated[
    list[str] | None, typer.Option("--shape", metavar="NxK", help="Size of a layer (repeatable). Default: 4096x4096.")
]
Formats = Annotated[
    list[str] | None,
    typer.Option("--format", metavar="RECIPE", help="Format of weights (repeatable); `quantplug plugins` lists them."),
]
Kernels = Annotated[
    list[str] | None,
    typer.Option("--kernel", metavar="NAME", help="Kernel, or a glob such as 'cpu.*' (repeatable). Default: all."),
]
Seconds = Annotated[float | None, typer.Option(min=0.001, help="How long each point is measured. Default: 0.2.")]
Quick = Annotated[bool, typer.Option("--quick", help="One format, one shape, three numbers of rows, 0.05 seconds.")]
Plot = Annotated[Path | None, typer.Option(metavar="FILE", help="Draw speed over rows: out.svg, out.png or out.pdf.")]
Compare = Annotated[
    tuple[Path, Path] | None,
    typer.Option(metavar="A B", help="Measure nothing; compare what --json printed on two occasions."),
]


def bench(
    checkpoint: OptionalCheckpoint = None,
    *,
    shapes: Shapes = None,
    formats: Formats = None,
    rows: Rows = None,
    kernels: Kernels = None,
    dtype: Dtype = None,
    settings: Settings = None,
    seconds: Seconds = None,
    quick: Quick = False,
    as_json: AsJson = False,
    plot: Plot = None,
    compare: Compare = None,
) -> None:
    """Measure kernels: microseconds, GB/s, TFLOP/s, shares of what the machine reaches, and against torch's own."""
    if checkpoint is not None and (formats or shapes):
        raise typer.BadParameter("a checkpoint has formats and shapes of its own: no --format and --shape with it")
    if plot is not None:
        require_matplotlib()
    if compare is not None:
        _compare(*compare, as_json=as_json)
        return
    from quantplug.benching import bench as measure
    from quantplug.benching import default_rows
    from quantplug.benchreport import report_to_json
    from quantplug.detect import detect
    from quantplug_cli.progress import steps

    platform = detect()
    cases = _cases(checkpoint, formats, shapes, dtype, settings, quick=quick)
    with steps() as progress:
        report = measure(
            cases,
            rows=read_rows(rows) or default_rows(platform, quick=quick),
            kernels=kernels or (),
            seconds=seconds or (_QUICK_SECONDS if quick else _SECONDS),
            platform=platform,
            progress=progress,
        )
    if plot is not None:
        draw(report, plot)
    if as_json:
        typer.echo(json.dumps(report_to_json(report), indent=1))
    else:
        show(report)
        if plot is not None:
            typer.echo(f"drawn: {plot}")


def _cases(
    checkpoint: str | None,
    formats: list[str] | None,
    shapes: list[str] | None,
    dtype: str | None,
    settings: list[str] | None,
    *,
    quick: bool,
) -> list[Case]:
    from quantplug.benching import SHAPE, cases_of_checkpoint, cases_of_recipes, default_recipes

    if checkpoint is not None:
        return cases_of_checkpoint(checkpoint, dtype=dtype, override=read_settings(settings))
    sizes = [_shape(text) for text in shapes or ()] or [SHAPE]
    recipes = formats or default_recipes()
    if quick:
        sizes, recipes = sizes[:1], recipes[:1]
    return cases_of_recipes(recipes, sizes, dtype or "bfloat16")


def _shape(text: str) -> tuple[int, int]:
    found = _SHAPE.fullmatch(text)
    if found is None:
        raise typer.BadParameter(f"{text!r} is not NxK, such as 4096x14336", param_hint="--shape")
    return int(found[1]), int(found[2])


def show(report: BenchReport) -> None:
    """Print what the machine reaches, and one table per format and shape."""
    from rich.console import Console

    console = Console(highlight=False)
    reached = ", ".join(f"{dtype} {flops / 1e12:.3g} TFLOP/s" for dtype, flops in report.flops)
    console.print(f"{report.platform}, {report.device}", style="bold", markup=False)
    console.print(f"reads {report.read / 1e9:.4g} GB/s; large products: {reached}")
    for (label, (n, k), dtype), points in groupby(report.points, key=lambda p: (p.label, p.shape, p.dtype)):
        console.print(f"\n{label}, N x K = {n} x {k}, {dtype}", style="bold", markup=False)
        _show_points(console, list(points))
    for failure in report.failures:
        size = "{} x {}".format(*failure.shape)
        text = f"not timed: {failure.kernel}, {failure.label} {size}: {failure.reason}"
        console.print(text, style="red", markup=False)


def _show_points(console: Console, points: Sequence[Point]) -> None:
    from rich import box
    from rich.table import Table

    from quantplug.benchreport import DENSE
    from quantplug_cli.text import microseconds

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("kernel", no_wrap=True)
    for title in ("M", "us", "GB/s", "of read", "TFLOP/s", "of peak", f"x {DENSE}"):
        table.add_column(title, justify="right", no_wrap=True)
    fastest = {rows: min(p.us for p in points if p.rows == rows) for rows in {p.rows for p in points}}
    for kernel, found in groupby(points, key=lambda point: point.kernel):
        for number, point in enumerate(found):
            table.add_row(
                kernel if not number else "",
                str(point.rows),
                microseconds(point.us),
                f"{point.gbps:.3g}",
                f"{point.of_read:.0%}",
                f"{point.tflops:.3g}",
                f"{point.of_flops:.0%}",
                f"{point.of_dense:.2f}",
                style="bold green" if point.us == fastest[point.rows] else "",
            )
    console.print(table)


def _compare(before: Path, after: Path, *, as_json: bool) -> None:
    from quantplug.benchreport import compare, report_from_json
    from quantplug.jsonio import read_json
    from quantplug.serial import plain

    first, second = (report_from_json(read_json(path), str(path)) for path in (before, after))
    found = compare(first, second)
    if as_json:
        typer.echo(json.dumps(plain(found), indent=1))
    else:
        show_comparison(found, first, second)


def show_comparison(found: Comparison, before: BenchReport, after: BenchReport) -> None:
    """Print both times of every common point, their ratio, and the geometric mean by kernel."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from quantplug.benchreport import DENSE
    from quantplug_cli.text import microseconds

    console = Console(highlight=False)
    if (before.device, before.platform) != (after.device, after.platform):
        console.print(f"different machines: {before.device}; {after.device}", style="yellow", markup=False)
    versions = dict(before.versions)
    for name, version in after.versions:
        if versions.get(name, version) != version:
            console.print(f"{name}: {versions[name]} before, {version} after", markup=False)
    for (label, (n, k)), changes in groupby(found.changes, key=lambda c: (c.before.label, c.before.shape)):
        console.print(f"\n{label}, N x K = {n} x {k}", style="bold", markup=False)
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
        table.add_column("kernel", no_wrap=True)
        for title in ("M", "us before", "us after", "times as fast", f"x {DENSE}"):
            table.add_column(title, justify="right", no_wrap=True)
        for kernel, changed in groupby(changes, key=lambda change: change.before.kernel):
            for number, change in enumerate(changed):
                name = kernel if not number else ""
                us = microseconds(change.before.us), microseconds(change.after.us)
                beside = f"{change.before.of_dense:.2f} to {change.after.of_dense:.2f}"
                colour = _colour(change.times)
                table.add_row(name, str(change.before.rows), *us, f"{change.times:.2f}", beside, style=colour)
        console.print(table)
    by_kernel: dict[str, list[float]] = {}
    for change in found.changes:
        by_kernel.setdefault(change.before.kernel, []).append(change.times)
    for kernel, times in by_kernel.items():
        mean = exp(fsum(log(value) for value in times) / len(times))
        console.print(f"{kernel}: {mean:.3f} times as fast (geometric mean of {len(times)})", markup=False)
    for title, points in (("only before", found.only_before), ("only after", found.only_after)):
        if points:
            names = ", ".join(dict.fromkeys(f"{point.kernel} {point.label}" for point in points))
            console.print(f"{title}: {len(points)} points ({names})", markup=False)


def _colour(times: float) -> str:
    """Return a colour for what changed by more than two runs of the same differ."""
    return "green" if times > 1 + _NOISE else "red" if times < 1 - _NOISE else ""
