"""
`quantplug plugins`: what is installed, from which distribution, what failed and why.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from quantplug_cli.options import AsJson

if TYPE_CHECKING:
    from collections.abc import Mapping

    from quantplug.jsonio import Json
    from quantplug.registry import Provided, Registry

Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Show where each lies, and tracebacks of failures.")]


def plugins(*, as_json: AsJson = False, verbose: Verbose = False) -> None:
    """Show what is installed, from which distribution, what failed and why."""
    import quantplug

    registry = quantplug.registry()
    if as_json:
        import json

        typer.echo(json.dumps(describe(registry), indent=2))
        return
    typer.echo(f"quantplug {quantplug.__version__}, plugin API {_api_version()}")
    provided = _provided(registry)
    for info in registry.plugins:
        typer.echo(f"\n{typer.style(info.distribution, bold=True)} {info.version}  (API {info.api}, {info.module})")
        for kind, names in provided.get(info.distribution, {}).items():
            typer.echo(f"  {kind + ':':<14}{', '.join(names)}")
        if verbose:
            typer.echo(f"  {'location:':<14}{info.location}")
    for title, items in (
        ("failed", registry.failures),
        ("disabled", registry.disabled),
        ("in conflict", registry.conflicts),
    ):
        if items:
            typer.secho(f"\n{title}:", fg=typer.colors.RED if title != "disabled" else None)
            for item in items:
                typer.echo(f"  {item}")
                detail = getattr(item, "detail", "")
                if verbose and detail:
                    typer.echo("    " + detail.strip().replace("\n", "\n    "))


def describe(registry: Registry) -> dict[str, Json]:
    """Return everything the command shows, as JSON."""
    from quantplug.serial import plain, to_json

    provided = _provided(registry)
    return {
        "api": _api_version(),
        "plugins": [plain(info) for info in registry.plugins],
        "provides": to_json(provided),
        "failures": [plain(failure) for failure in registry.failures],
        "disabled": [plain(item) for item in registry.disabled],
        "conflicts": [plain(conflict) for conflict in registry.conflicts],
    }


def _provided(registry: Registry) -> dict[str, dict[str, list[str]]]:
    from quantplug.dense import DenseProduct

    result: dict[str, dict[str, list[str]]] = {}
    mappings: dict[str, Mapping[str, Provided[object]]] = {
        "schemes": registry.schemes,
        "recipes": registry.recipes,
        "dialects": registry.dialects,
        "kernels": {name: p for name, p in registry.kernels.items() if not isinstance(p.item, DenseProduct)},
        "platforms": registry.platforms,
        "hosts": registry.hosts,
        "peers": registry.peers,
    }
    for kind, mapping in mappings.items():
        for name, provided in sorted(mapping.items()):
            result.setdefault(provided.plugin, {}).setdefault(kind, []).append(name)
    return result


def _api_version() -> str:
    from quantplug.hooks import API_VERSION

    return API_VERSION
