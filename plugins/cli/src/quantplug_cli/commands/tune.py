"""
`quantplug tune`: measure the kernels a checkpoint could run on, so that plans on this machine go by it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from quantplug_cli.options import (
    AsJson,
    Checkpoint,
    Dtype,
    LayoutBudget,
    PolicyFile,
    Quantize,
    Rows,
    Settings,
    Skip,
    read_policy,
    read_rows,
    read_settings,
    read_wish,
)

if TYPE_CHECKING:
    from rich.console import Console

    from quantplug.tuning import TunedProblem, TuneReport

Seconds = Annotated[float, typer.Option(min=0.001, help="How long each kernel is measured for each number of rows.")]


def tune(
    checkpoint: Checkpoint,
    *,
    rows: Rows = None,
    seconds: Seconds = 0.2,
    dtype: Dtype = None,
    policy: PolicyFile = None,
    layout_budget: LayoutBudget = None,
    quantize: Quantize = None,
    skip: Skip = None,
    settings: Settings = None,
    as_json: AsJson = False,
) -> None:
    """Measure every kernel that accepts a layer, and keep the times: plans on this machine then go by them."""
    from quantplug.tuning import tune as measure
    from quantplug_cli.progress import steps

    with steps() as progress:
        report = measure(
            checkpoint,
            rows=read_rows(rows),
            seconds=seconds,
            dtype=dtype,
            policy=read_policy(policy, layout_budget),
            override=read_settings(settings),
            quantize=read_wish(quantize, skip),
            progress=progress,
        )
    if as_json:
        import json

        from quantplug.serial import plain

        typer.echo(json.dumps(plain(report), indent=2))
    else:
        show(report, checkpoint)


def show(report: TuneReport, title: str) -> None:
    """Print one table per problem, what changed, and where the times are kept."""
    from rich.console import Console

    console = Console(highlight=False)
    console.print(f"{title} on {report.platform}, {report.device}; microseconds a call", style="bold", markup=False)
    for item in report.problems:
        _show_problem(console, item)
    for text in report.skipped:
        console.print(f"not measured: {text}", markup=False)
    for text in report.warnings:
        console.print(f"warning: {text}", style="yellow", markup=False)
    changed = sum(item.layers for item in report.problems if item.before.choices != item.after.choices)
    layers = sum(item.layers for item in report.problems)
    console.print(f"\n{changed} of {layers} layers run on other kernels than by estimate", markup=False)
    console.print(f"kept in {report.path}", markup=False, soft_wrap=True)


def _show_problem(console: Console, item: TunedProblem) -> None:
    from rich import box
    from rich.markup import escape
    from rich.table import Table
    from rich.text import Text

    from quantplug.select import describe_problem
    from quantplug_cli.text import choices, microseconds

    plural = "layer" if item.layers == 1 else "layers"
    console.print(f"\n[bold]{escape(describe_problem(item.problem))}[/bold], {item.layers} {plural}")
    timed = [measurement for measurement in item.measurements if measurement.us]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("M", justify="right", vertical="bottom")
    for measurement in timed:
        table.add_column(Text(measurement.kernel.replace(".", ".\n")), justify="right", no_wrap=True)
    for rows in sorted({rows for measurement in timed for rows, _ in measurement.us}):
        chosen = item.after.at(rows)
        cells = [
            Text(microseconds(measurement.at(rows)), style="bold green" if measurement.kernel == chosen else "")
            for measurement in timed
        ]
        table.add_row(str(rows), *cells)
    if timed:
        console.print(table)
    for measurement in item.measurements:
        if measurement.wrong:
            console.print(f"wrong: {measurement.kernel}: {measurement.wrong}", style="red", markup=False)
    before, after = choices(item.before), choices(item.after)
    console.print(f"now {after}" + (f", by estimate {before}" if before != after else ", as by estimate"), markup=False)
