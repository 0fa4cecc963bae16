"""
`quantplug convert`: a dense checkpoint becomes a quantized one.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quantplug_cli.options import AsJson, Skip, read_settings

if TYPE_CHECKING:
    from quantplug.jsonio import Json

Source = Annotated[str, typer.Argument(metavar="SRC", help="Dense checkpoint directory, or a repository id.")]
Destination = Annotated[Path, typer.Argument(metavar="DST", help="Directory to create; must not exist.")]
Scheme = Annotated[str | None, typer.Option(help="Format to write; `quantplug plugins` lists them.")]
Recipe = Annotated[
    str | None,
    typer.Option("--quantize", metavar="RECIPE", help="Short for a format and its parameters: int4-g64, fp8, …"),
]
Bits = Annotated[int | None, typer.Option(help="Bits per weight.")]
GroupSize = Annotated[int | None, typer.Option(help="Inputs that share a scale; -1 for whole rows.")]
Symmetric = Annotated[bool | None, typer.Option("--sym/--asym", help="Without or with zero points.")]
HeadBits = Annotated[
    int | None, typer.Option(help="Quantize the output head too, with this many bits and one scale per row.")
]
Calibrate = Annotated[
    Path | None, typer.Option(metavar="TEXT", help="Quantize by what this text sends through the layers.")
]
Tokens = Annotated[int, typer.Option(help="Tokens of the calibration text to use at most.")]
More = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any other parameter of the format (repeatable).")
]


def convert(
    source: Source,
    destination: Destination,
    *,
    scheme: Scheme = None,
    quantize: Recipe = None,
    bits: Bits = None,
    group_size: GroupSize = None,
    sym: Symmetric = None,
    head_bits: HeadBits = None,
    skip: Skip = None,
    calibrate: Calibrate = None,
    calibration_tokens: Tokens = 8192,
    settings: More = None,
    as_json: AsJson = False,
) -> None:
    """Quantize a dense checkpoint, layer by layer; the destination appears whole or not at all."""
    import quantplug
    from quantplug.convert import Calibration
    from quantplug.entries import path_entries
    from quantplug_cli.progress import bar

    stated: dict[str, Json | None] = {"bits": bits, "group_size": group_size, "sym": sym}
    params = {name: value for name, value in stated.items() if value is not None} | read_settings(settings)
    if (scheme is None) == (quantize is None):
        raise typer.BadParameter("say either --scheme or --quantize")
    if quantize is not None:
        recipe = quantplug.registry().recipe(quantize).item
        scheme, params = recipe.scheme, dict(recipe.params) | params
    head: dict[str, Json] | None = None
    if head_bits is not None:
        head = params | {"bits": head_bits, "group_size": -1, "sym": True}
    calibration = None
    if calibrate is not None:
        calibration = Calibration(_read_text(calibrate), tokens=calibration_tokens)
    with bar() as progress:
        report = quantplug.convert(
            source,
            destination,
            scheme=str(scheme),
            params=params,
            head=head,
            skip=path_entries(list(skip or ()), "--skip"),
            calibration=calibration,
            progress=progress,
        )
    if as_json:
        import json

        from quantplug.serial import plain

        typer.echo(json.dumps(plain(report), indent=2))
        return
    from quantplug_cli.text import size

    for words, count in report.quantized.items():
        typer.echo(f"{count} layers: {words}")
    if report.rounded:
        typer.echo(f"{report.rounded} of them rounded without the text: it is not followed into experts")
    typer.echo(
        f"{len(report.dense)} linear layers left whole{': ' + ', '.join(report.dense[:3]) if report.dense else ''}"
    )
    typer.echo(f"{size(report.source_bytes)} -> {size(report.written_bytes)} in {report.seconds:.1f} s: {destination}")


def _read_text(file: Path) -> str:
    from quantplug.errors import ConvertError

    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConvertError(
            "QP-CONV-CALIBRATION", str(file), f"cannot be read ({error})", expected="UTF-8 text"
        ) from error
