"""
`quantplug lint`: everything that is wrong or odd about a checkpoint, at once, without loading it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from quantplug.findings import SEVERITIES
from quantplug_cli.options import AsJson, Checkpoint, Dtype, Settings, read_settings

if TYPE_CHECKING:
    from quantplug.findings import Finding, LintReport

FOUND = 3
"""Exit code when a finding is an error."""

Deep = Annotated[bool, typer.Option("--deep", help="Read every 8-bit float code of the weights, too.")]
NoPeers = Annotated[bool, typer.Option("--no-peers", help="Do not compare with the rules of other engines.")]

_STYLES = {"error": "red", "warning": "yellow", "note": "dim"}


def lint(
    checkpoint: Checkpoint,
    *,
    deep: Deep = False,
    no_peers: NoPeers = False,
    dtype: Dtype = None,
    settings: Settings = None,
    as_json: AsJson = False,
) -> None:
    """Find entries that match nothing or too much, rules against stored tensors, bad scales, what engines differ in."""
    import quantplug
    from quantplug_cli.progress import bar

    with bar() as progress:
        report = quantplug.lint(
            checkpoint,
            override=read_settings(settings),
            dtype=dtype,
            deep=deep,
            peers=not no_peers,
            progress=progress,
        )
    if as_json:
        import json

        typer.echo(json.dumps(report.to_json(), ensure_ascii=False))
    else:
        show(report, checkpoint)
    if report.worst == "error":
        raise typer.Exit(FOUND)


def show(report: LintReport, title: str) -> None:
    """Print the findings, the worst first, and what was looked at."""
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True)
    console.print(title, style="bold", markup=False)
    for finding in report.findings:
        console.print(f"{finding.severity} {finding.code}", style=_STYLES[finding.severity], markup=False)
        for line in lines(finding):
            console.print(f"  {line}", markup=False)
    counts = ", ".join(
        f"{number} {severity}{'s' if number != 1 else ''}"
        for severity in SEVERITIES
        if (number := report.count(severity))
    )
    console.print(f"{counts or 'nothing found'}; {looked_at(report)}", markup=False)


def lines(finding: Finding) -> list[str]:
    """Return a finding in lines: where and what, the names it concerns, what to do."""
    told = [f"{finding.where}: {finding.what}" if finding.where else finding.what]
    if finding.names and finding.names != (finding.where,):
        more = finding.count - len(finding.names)
        told.append(", ".join(finding.names) + (f" and {more:,} more" if more > 0 else ""))
    return [*told, *([finding.fix] if finding.fix else [])]


def looked_at(report: LintReport) -> str:
    """Return what was looked at, in words."""
    parts = [f"{report.modules:,} modules", f"{report.scales:,} scale tensors"]
    parts += [f"{report.codes:,} weights of 8-bit floats"] if report.codes else []
    engines = ", ".join(f"{name} {version}" for name, version in report.peers)
    return ", ".join(parts) + " looked at" + (f"; compared with {engines}" if engines else "")
