"""
A second copy of a layer's weights, in the layout of kernels that are faster for other numbers of rows.

It takes about as much memory as the first, so that a plan has none unless the caller's policy names a budget.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import log
from typing import TYPE_CHECKING

from quantplug.choices import ROW_BUCKETS, bytes_held, choices, may_join, time_of
from quantplug.kernel import Accepted
from quantplug.plan import Decision
from quantplug.select import kernels_for
from quantplug.spec import LinearProblem

if TYPE_CHECKING:
    from collections.abc import Sequence

    from quantplug.moe import MoEProblem
    from quantplug.plan import Candidate, LayerPlan
    from quantplug.platform import Platform
    from quantplug.registry import Registry

_WORTH = 1.05
"""What a second layout must gain at some number of rows, as a factor: less is within what estimates are wrong by."""


@dataclass(frozen=True, slots=True)
class SecondLayout:
    """
    What a second layout would bring to a layer.

    Attributes:
        decision: kernels of both layouts, `extra_bytes` for each layer.
        gain: mean logarithm of one layout's time over two's, over `ROW_BUCKETS`.
    """

    decision: Decision
    gain: float


def second_layout(
    problem: LinearProblem | MoEProblem, decision: Decision, platform: Platform, registry: Registry
) -> SecondLayout | None:
    """
    Return the layout that gains most beside the one of a decision; None where none gains, or a policy named the kernel.

    Kernels of both must want a fused layer whole, or both in parts.
    """
    kernels = kernels_for(problem, registry)
    first = kernels[decision.kernel].item
    asked = {
        c.kernel: c
        for c in decision.candidates
        if isinstance(c.verdict, Accepted)
        and not kernels[c.kernel].item.traits.fallback
        and (decision.basis == "estimated" or c.measured)
    }
    if decision.kernel not in asked or asked[decision.kernel].preferred:
        return None
    whole = not isinstance(problem, LinearProblem) or problem.uniform
    layouts: dict[str, list[Candidate]] = {}
    for name, candidate in sorted(asked.items()):
        kernel = kernels[name].item
        alike = whole or kernel.traits.uniform_segments == first.traits.uniform_segments
        if alike and may_join(kernel, first, platform):
            layouts.setdefault(kernel.layout_id, []).append(candidate)
    own = layouts.pop(first.layout_id)
    one = [min(time_of(c, rows, decision.basis) for c in own) for rows in ROW_BUCKETS]
    found: list[SecondLayout] = []
    for layout, theirs in layouts.items():
        two = [min(time_of(c, rows, decision.basis) for c in (*own, *theirs)) for rows in ROW_BUCKETS]
        if max(before / after for before, after in zip(one, two, strict=True)) < _WORTH:
            continue
        chosen = choices([*own, *theirs], kernels, decision.basis)
        if not any(choice.layout_id == layout for choice in chosen):
            continue  # what gains lies between the rows that were measured
        held = max(bytes_held(problem, asked[c.kernel]) for c in chosen if c.layout_id == layout)
        gain = sum(log(before / after) for before, after in zip(one, two, strict=True)) / len(ROW_BUCKETS)
        found.append(SecondLayout(replace(decision, choices=chosen, extra_bytes=held), gain))
    return max(found, key=lambda each: (each.gain, -each.decision.extra_bytes), default=None)


def spend(
    budget: int,
    layers: Sequence[LayerPlan],
    decisions: Sequence[Decision],
    platform: Platform,
    registry: Registry,
) -> tuple[tuple[LayerPlan, ...], tuple[Decision, ...]]:
    """
    Return a plan's layers and decisions with second layouts for as many layers as the budget allows, in bytes.

    Who gains most comes first; layers that ask the same get one together or not at all.
    """
    if budget <= 0:
        return tuple(layers), tuple(decisions)
    found: dict[int, SecondLayout] = {}
    counts: dict[int, int] = {}
    for layer in layers:
        index, problem = layer.decision, layer.problem
        if index is None or problem is None:
            continue
        if index not in counts and (offer := second_layout(problem, decisions[index], platform, registry)) is not None:
            found[index] = offer
        counts[index] = counts.get(index, 0) + 1
    made = list(decisions)
    for index, offer in sorted(found.items(), key=lambda item: (-item[1].gain, item[0])):
        wanted = offer.decision.extra_bytes * counts[index]
        if wanted <= budget:
            budget -= wanted
            made[index] = offer.decision
    return tuple(
        layer
        if layer.decision is None
        else replace(layer, memory_bytes=layer.memory_bytes + made[layer.decision].extra_bytes)
        for layer in layers
    ), tuple(made)
