"""
`quantplug why`: one layer, all the way down.
"""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING, Annotated

import typer

from quantplug_cli.options import (
    AsJson,
    Checkpoint,
    Dtype,
    For,
    LayoutBudget,
    PolicyFile,
    Quantize,
    Settings,
    Skip,
    read_policy,
    read_settings,
    read_wish,
)

if TYPE_CHECKING:
    from quantplug.kernel import Verdict
    from quantplug.plan import Candidate, LayerPlan, Plan

Layer = Annotated[str, typer.Argument(metavar="LAYER", help="Module path, such as model.layers.3.mlp.down_proj.")]

_SHOWN = 6
"""Stored shards that are listed one by one."""


def why(
    checkpoint: Checkpoint,
    layer: Layer,
    *,
    platform: For = None,
    dtype: Dtype = None,
    policy: PolicyFile = None,
    layout_budget: LayoutBudget = None,
    quantize: Quantize = None,
    skip: Skip = None,
    settings: Settings = None,
    as_json: AsJson = False,
) -> None:
    """Explain one layer: the deciding rule, its tensors, and every kernel's answer."""
    import quantplug

    made = quantplug.plan(
        checkpoint,
        platform=platform,
        dtype=dtype,
        policy=read_policy(policy, layout_budget),
        override=read_settings(settings),
        quantize=read_wish(quantize, skip),
    )
    found = made.layer(layer)
    if as_json:
        import json

        from quantplug.serial import to_json

        typer.echo(json.dumps({"layer": to_json(found), "decision": to_json(made.decision_of(found))}, indent=2))
    else:
        _show(made, found)


def _show(made: Plan, layer: LayerPlan) -> None:
    from quantplug.select import describe_problem
    from quantplug_cli.text import measured, rows, size, told, verdict

    typer.secho(f"{layer.path} on {made.platform}", bold=True)
    _line("rule", layer.rule)
    for note in layer.notes:
        _line("note", note)
    _line("scheme", layer.scheme or "none: it stays dense")
    for segment in layer.segments[:_SHOWN]:
        _line("stored as", ", ".join(name for _, name in segment.tensors))
    if len(layer.segments) > _SHOWN:
        _line("", f"and so on, {len(layer.segments)} projections of {len(layer.segments) // _parts(layer)} experts")
    if layer.tensors:
        more = f" and {len(layer.tensors) - _SHOWN} more" if len(layer.tensors) > _SHOWN else ""
        _line("bias" if layer.segments else "stored as", ", ".join(layer.tensors[:_SHOWN]) + more)
    decision = made.decision_of(layer)
    memory = f"{size(layer.file_bytes)} in files, about {size(layer.memory_bytes)} in memory"
    if decision is not None and decision.extra_bytes:
        memory += f", {size(decision.extra_bytes)} of it for the second layout, {decision.layouts[1]}"
    _line("bytes", memory)
    if decision is not None and layer.problem is not None:
        _line("problem", describe_problem(layer.problem))
        for choice in decision.choices:
            _line("kernel", f"{choice.kernel} for {rows(choice)} ({decision.basis}, layout {choice.layout_id})")
        for (plugin, policy, answer, us), alike in groupby(told(decision), key=_answer):
            names = ", ".join(candidate.kernel for candidate in alike)
            said = f" [{policy}]" if policy else ""
            _line("asked", f"{names} ({plugin}){said}: {verdict(answer)}{measured(us)}")
    for field in made.fields:
        _line("from", f"{field.name} = {field.value!r}  ({field.origin})")


def _answer(candidate: Candidate) -> tuple[str, str, Verdict, tuple[tuple[int, float], ...]]:
    """Return what candidates that are told in one line have in common."""
    return candidate.plugin, candidate.policy, candidate.verdict, candidate.measured


def _parts(layer: LayerPlan) -> int:
    return len(layer.experts.files.projections) if layer.experts is not None else 1


def _line(label: str, text: str) -> None:
    typer.echo(f"  {label + ':':<11}{text}")
