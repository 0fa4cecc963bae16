"""
The `quantplug` command and its exit codes.

| code | meaning |
|---|---|
| 0 | done |
| 1 | a defect in quantplug or a plugin; the traceback is shown |
| 2 | the command line is wrong |
| 3 | a configuration or a skip rule is wrong (`QP-CFG-…`, `QP-SKIP-…`), or `lint` found an error |
| 4 | a checkpoint file or tensor is wrong (`QP-ST-…`) |
| 5 | no plan satisfies what was asked (`QP-PLAN-…`) |
| 6 | loading or running failed (`QP-LOAD-…`, `QP-RUN-…`) |
| 7 | converting failed (`QP-CONV-…`) |
| 8 | a plugin is missing, broken or in conflict (`QP-PLUG-…`) |
| 9 | the framework could not run the model (`QP-HOST-…`) |
| 130 | interrupted |
"""

from __future__ import annotations

import json
import sys

import typer

from quantplug import errors
from quantplug_cli.commands import bench, convert, lint, plan, plugins, run, tune, why

_EXIT_CODES: dict[type[errors.QuantplugError], int] = {
    errors.ConfigError: 3,
    errors.CheckpointError: 4,
    errors.PlanError: 5,
    errors.LoadError: 6,
    errors.RunError: 6,
    errors.ConvertError: 7,
    errors.PluginError: 8,
    errors.HostError: 9,
}
_INTERRUPTED = 130

app = typer.Typer(
    name="quantplug",
    help="Run quantized checkpoints on any hardware through plugins, and see why each kernel was chosen.",
    epilog="Exit codes: 0 done, 1 defect, 2 usage, 3 configuration, 4 checkpoint, 5 plan, 6 load or run, 7 convert, "
    "8 plugin, 9 framework, 130 interrupted.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
for command in (plugins.plugins, plan.plan, why.why, lint.lint, convert.convert, run.run, tune.tune, bench.bench):
    app.command()(command)


def main() -> None:
    """Run the command line; a deliberate error becomes its message (or JSON with `--json`) and exit code."""
    try:
        app()
    except errors.QuantplugError as error:
        if "--json" in sys.argv:
            typer.echo(json.dumps({"error": error.to_json()}))
        typer.secho(f"error: {error}", err=True, fg=typer.colors.RED)
        sys.exit(_EXIT_CODES[type(error)])
    except KeyboardInterrupt:
        typer.secho("interrupted", err=True)
        sys.exit(_INTERRUPTED)
