"""
`quantplug plan`: every decision about a checkpoint, before a weight is read.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import typer

from quantplug_cli.options import (
    AsJson,
    Checkpoint,
    DraftModel,
    DraftQuantize,
    Dtype,
    For,
    LayoutBudget,
    PolicyFile,
    Quantize,
    Settings,
    Skip,
    Strict,
    read_draft,
    read_policy,
    read_settings,
    read_wish,
)

if TYPE_CHECKING:
    from rich.table import Table

    from quantplug.plan import LayerPlan, Plan

_COMPARED = (1, 2048)
"""Numbers of rows at which kernels that were passed over are held against those that were not."""


def plan(
    checkpoint: Checkpoint,
    *,
    platform: For = None,
    dtype: Dtype = None,
    policy: PolicyFile = None,
    layout_budget: LayoutBudget = None,
    quantize: Quantize = None,
    skip: Skip = None,
    settings: Settings = None,
    draft: DraftModel = None,
    draft_quantize: DraftQuantize = None,
    strict: Strict = False,
    as_json: AsJson = False,
) -> None:
    """Show rule, scheme and kernel of every layer, why other kernels were refused, and the memory it takes."""
    import quantplug

    made = quantplug.plan(
        checkpoint,
        platform=platform,
        dtype=dtype,
        policy=read_policy(policy, layout_budget),
        override=read_settings(settings),
        quantize=read_wish(quantize, skip),
        draft=read_draft(draft, draft_quantize),
        strict=strict,
    )
    if as_json:
        typer.echo(made.to_json())
    else:
        show(made, checkpoint)
        if made.draft is not None:
            typer.echo("")
            show(made.draft, f"draft: {draft}")


def show(made: Plan, title: str) -> None:
    """Print a plan: one row per group of layers, then the refusals, the totals and the warnings."""
    from rich.console import Console

    from quantplug_cli.text import size

    console = Console(highlight=False, soft_wrap=False)
    console.print(f"[bold]{title}[/bold] on [bold]{made.platform}[/bold], {made.dtype}, plan {made.hash[:12]}")
    console.print(_table(made))
    for line in _refusals(made):
        console.print(line, style="dim", markup=False)
    files = sum(layer.file_bytes for layer in made.layers)
    memory = sum(layer.memory_bytes for layer in made.layers)
    quantized = sum(layer.quantized for layer in made.layers)
    second = sum(made.decisions[layer.decision].extra_bytes for layer in made.layers if layer.decision is not None)
    of_it = f", {size(second)} of it for second layouts" if second else ""
    console.print(f"{quantized} layers quantized; {size(files)} in files, about {size(memory)} in memory{of_it}")
    measured = sum(
        made.decisions[layer.decision].basis == "measured" for layer in made.layers if layer.decision is not None
    )
    if measured:
        console.print(f"{measured} layers by measured times, see `quantplug tune`", markup=False)
    for left in made.left:
        console.print(f"left: {left.reason} ({len(left.names)} tensors, {left.names[0]} …)", markup=False)
    if made.kv_cache is not None:
        spec = made.kv_cache.spec.describe() if made.kv_cache.spec is not None else "not described"
        console.print(
            f"handed over: cache of keys and values, {spec}, {len(made.kv_cache.scales)} scales", markup=False
        )
    for warning in made.warnings:
        console.print(f"warning: {warning}", style="yellow", markup=False)


def _table(made: Plan) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from quantplug_cli.grouping import group_layers
    from quantplug_cli.text import choices, size

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, expand=False, padding=(0, 1, 0, 0))
    table.add_column("layers, and the rule", overflow="fold", min_width=44)
    table.add_column("scheme", overflow="fold", max_width=20)
    table.add_column("kernel", overflow="fold")
    for name in ("n", "file", "memory"):
        table.add_column(name, justify="right", no_wrap=True)
    for group in group_layers(made):
        decision = made.decision_of(group.first)
        words = Text(group.names)
        words.append("\n  " + "; ".join([group.first.rule, *group.first.notes]), style="dim")
        table.add_row(
            words,
            _what(group.first, made),
            choices(decision) if decision is not None else "dense",
            str(len(group.layers)),
            size(group.file_bytes),
            size(group.memory_bytes),
        )
    return table


def _what(layer: LayerPlan, made: Plan) -> str:
    """Return how a layer is stored, and how many experts it has."""
    if layer.experts is not None:
        return f"{layer.experts.count} experts, {layer.scheme or made.dtype}"
    return (layer.scheme or made.dtype) if layer.kind == "linear" else layer.kind


def _refusals(made: Plan) -> list[str]:
    """Return what some decision refused or passed over, with the reasons and how often; one line for the same words."""
    from quantplug.choices import time_of
    from quantplug.kernel import Rejected
    from quantplug_cli.text import told

    layers = Counter(layer.decision for layer in made.layers if layer.decision is not None)
    reasons: dict[str, Counter[str]] = {}
    slower: dict[tuple[str, str], list[tuple[list[float], int]]] = {}
    for index, decision in enumerate(made.decisions):
        chosen = {choice.kernel for choice in decision.choices}
        by_name = {candidate.kernel: candidate for candidate in decision.candidates}
        for candidate in told(decision):
            if candidate.kernel in chosen:
                continue
            if isinstance(candidate.verdict, Rejected):
                reasons.setdefault(candidate.kernel, Counter())[candidate.verdict.reason] += layers[index]
                continue
            basis = "estimated" if not candidate.measured else decision.basis
            times = [
                time_of(candidate, rows, basis) / time_of(by_name[decision.at(rows)], rows, basis) for rows in _COMPARED
            ]
            slower.setdefault((candidate.kernel, basis), []).append((times, layers[index]))
    lines = [
        f"not {kernel}: fits, {basis} "
        + ", ".join(
            f"{_span([times[place] for times, _ in found])} x{'' if place else ' the time'} at M = {rows}"
            for place, rows in enumerate(_COMPARED)
        )
        + f" ({sum(count for _, count in found)} layers)"
        for (kernel, basis), found in slower.items()
    ]
    alike: dict[str, list[str]] = {}
    for kernel, counter in reasons.items():
        words = "; ".join(f"{text} ({count} layers)" for text, count in counter.most_common(3))
        alike.setdefault(words, []).append(kernel)
    return lines + [f"not {', '.join(kernels)}: {words}" for words, kernels in alike.items()]


def _span(values: list[float]) -> str:
    low, high = (f"{value:.1f}" if value < 100 else f"{value:,.0f}" for value in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"
