"""
The figures of `quantplug bench` as a picture.
"""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from matplotlib.axes import Axes

    from quantplug.benchreport import BenchReport, Point

_WIDTH, _HEIGHT, _MOST_COLUMNS = 5.2, 3.8, 3
_MARKERS = "osD^vP*Xdh"


def require_matplotlib() -> None:
    """Raise a usage error that says what to install, before anything is measured."""
    from importlib.util import find_spec

    if find_spec("matplotlib") is None:
        raise typer.BadParameter("needs matplotlib: pip install 'quantplug-cli[plot]'", param_hint="--plot")


def draw(report: BenchReport, path: Path) -> None:
    """Draw how many times as fast as torch's own product each kernel is, over rows; a panel per problem."""
    from matplotlib.figure import Figure

    panels = [
        (key, list(points)) for key, points in groupby(report.points, key=lambda point: (point.label, point.shape))
    ]
    columns = min(_MOST_COLUMNS, len(panels))
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(_WIDTH * columns, _HEIGHT * lines + 0.5), layout="constrained")
    figure.suptitle(f"{report.device} ({report.platform}), reads {report.read / 1e9:.4g} GB/s")
    axes = figure.subplots(lines, columns, squeeze=False)
    for ((label, (n, k)), points), panel in zip(panels, axes.flat, strict=False):
        panel.set_title(f"{label}, N x K = {n} x {k}")
        _draw_panel(panel, points)
    for panel in axes.flat[len(panels) :]:
        panel.set_visible(False)
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise typer.BadParameter(f"cannot write {path}: {error}", param_hint="--plot") from error


def _draw_panel(panel: Axes, points: Sequence[Point]) -> None:
    from matplotlib.ticker import FuncFormatter, NullLocator

    from quantplug.benchreport import DENSE

    kernels = [(kernel, list(found)) for kernel, found in groupby(points, key=lambda point: point.kernel)]
    for number, (kernel, found) in enumerate(kernels):
        rows, times = [point.rows for point in found], [point.of_dense for point in found]
        if kernel == DENSE:
            panel.plot(rows, times, color="black", linestyle="--", linewidth=1, label=kernel)
        else:
            panel.plot(rows, times, marker=_MARKERS[number % len(_MARKERS)], markersize=5, label=kernel)
    panel.set_xscale("log", base=2)
    panel.set_yscale("log", base=2)
    panel.set_xticks([point.rows for point in kernels[0][1]])
    panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    panel.xaxis.set_minor_locator(NullLocator())
    panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    panel.set_xlabel("rows M")
    panel.set_ylabel(f"times as fast as {DENSE}")
    panel.grid(alpha=0.3)
    panel.legend(fontsize="small")
