"""
Options that several commands share, and how their text becomes values.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from collections.abc import Iterable

    from quantplug.draft import Draft
    from quantplug.jsonio import Json
    from quantplug.onload import OnLoad
    from quantplug.policy import Policy

Checkpoint = Annotated[
    str, typer.Argument(metavar="CKPT", help="Checkpoint directory, or a Hugging Face repository id.")
]
For = Annotated[
    str | None,
    typer.Option("--for", metavar="PLATFORM", help="Plan for other hardware: cpu, cuda:9.0, npu:910b. Default: here."),
]
Dtype = Annotated[
    str | None, typer.Option(help="Activation dtype: bfloat16, float16 or float32. Default: the checkpoint's.")
]
PolicyFile = Annotated[
    Path | None,
    typer.Option("--policy", metavar="FILE", help="TOML file that prefers, allows, denies or pins kernels."),
]
LayoutBudget = Annotated[
    str | None,
    typer.Option(metavar="SIZE", help="Memory for second copies of weights, such as 4GB. Default: the policy's, or 0."),
]
Strict = Annotated[bool, typer.Option("--strict", help="Make it an error when a rule and the stored tensors disagree.")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="State a quantization field that the file lacks (repeatable)."),
]
Quantize = Annotated[
    str | None,
    typer.Option(
        metavar="RECIPE", help="Quantize dense weights on load: int4-g64, fp8, …; `quantplug plugins` lists them."
    ),
]
DraftModel = Annotated[
    str | None,
    typer.Option("--draft", metavar="DIR", help="The model that drafts for it; next-n: the layers in its own files."),
]
DraftQuantize = Annotated[
    str | None,
    typer.Option(metavar="RECIPE", help="The same for the draft; dense leaves its configuration out of account."),
]
Skip = Annotated[
    list[str] | None,
    typer.Option(metavar="PATTERN", help="Leave layers whole: path, glob or re:EXPRESSION (repeatable)."),
]
Rows = Annotated[
    str | None, typer.Option(metavar="M,M,…", help="Numbers of rows, such as 1,16,256. Default: a few, by the machine.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]


def read_settings(settings: Iterable[str] | None) -> dict[str, Json]:
    """Turn `key=value` texts into values; a value is JSON where it parses as such, else a string."""
    result: dict[str, Json] = {}
    for setting in settings or ():
        key, sign, text = setting.partition("=")
        if not key or not sign:
            raise typer.BadParameter(f"{setting!r} is not KEY=VALUE")
        try:
            result[key] = json.loads(text)
        except ValueError:
            result[key] = text
    return result


def read_rows(text: str | None) -> tuple[int, ...]:
    """Turn `1,16,256` into numbers; () when the option is not given."""
    if text is None:
        return ()
    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise typer.BadParameter(f"{text!r} is not a list of numbers of rows such as 1,16,256", param_hint="--rows")
    return tuple(sorted({int(part) for part in parts}))


def read_wish(quantize: str | None, skip: list[str] | None) -> OnLoad | None:
    """Turn the options about quantizing on load into a wish; `--skip` alone makes no sense."""
    from quantplug.entries import path_entries
    from quantplug.onload import OnLoad

    if quantize is None:
        if skip:
            raise typer.BadParameter("--skip needs --quantize")
        return None
    return OnLoad(quantize, path_entries(list(skip or ()), "--skip"))


def read_draft(draft: str | None, quantize: str | None) -> Draft | None:
    """Turn the options about a draft into one; a wish about none makes no sense."""
    from quantplug.draft import NEXT_N, Draft

    if draft is None:
        if quantize is not None:
            raise typer.BadParameter("--draft-quantize needs --draft")
        return None
    return Draft(None if draft == NEXT_N else draft, quantize=quantize)


def read_policy(file: Path | None, layout_budget: str | None) -> Policy | None:
    """Read the policy file when one is named, and let an option replace its budget."""
    from quantplug.policy import Policy, parse_bytes

    if layout_budget is None:
        return None if file is None else Policy.from_toml(file)
    policy = Policy.from_environment() if file is None else Policy.from_toml(file)
    return replace(policy, layout_budget=parse_bytes(layout_budget, "--layout-budget"))
