"""
Weights of a layer in two layouts, each read by the kernels that are fastest for some numbers of rows.

The second takes about as much memory as the first, so that a plan has none unless the caller's policy names a budget.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import combinations
from math import log
from typing import TYPE_CHECKING

from quantplug.choices import ROW_BUCKETS, bytes_held, choices, may_join, time_of_fastest
from quantplug.kernel import Accepted
from quantplug.plan import Decision
from quantplug.select import kernels_for
from quantplug.spec import LinearProblem

if TYPE_CHECKING:
    from collections.abc import Sequence

    from quantplug.moe import MoEProblem
    from quantplug.plan import Candidate, LayerPlan
    from quantplug.platform import Platform
    from quantplug.policy import Policy
    from quantplug.registry import Registry

_WORTH = 1.05
"""What a second layout must gain at some number of rows, as a factor: less is within what estimates are wrong by."""


@dataclass(frozen=True, slots=True)
class SecondLayout:
    """
    What a second layout would bring to a layer.

    Attributes:
        decision: kernels of both layouts, `extra_bytes` of each layer beyond those of the best layout alone.
        gain: mean logarithm of one layout's time over two's, over the numbers of rows that count.
    """

    decision: Decision
    gain: float


def second_layout(
    problem: LinearProblem | MoEProblem,
    decision: Decision,
    platform: Platform,
    registry: Registry,
    rows: Sequence[int] = ROW_BUCKETS,
) -> SecondLayout | None:
    """
    Return the two layouts that gain most over the one of a decision; None where none gain, or a policy named the
    kernel.

    What is best alone, being a compromise, need not be one of the two. Kernels of both must want a fused layer whole,
    or both in parts. Of pairs that gain the same, the one of fewer bytes is taken, then that whose layouts come first
    among the decision's candidates.

    Args:
        problem: what a layer asks.
        decision: that for one layout.
        platform: the machine it is for.
        registry: who was asked.
        rows: numbers of rows whose mean counts.
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
    for name, candidate in asked.items():
        kernel = kernels[name].item
        alike = whole or kernel.traits.uniform_segments == first.traits.uniform_segments
        if alike and may_join(kernel, first, platform):
            layouts.setdefault(kernel.layout_id, []).append(candidate)
    alone = layouts[first.layout_id]
    one = bytes_held(problem, asked[decision.kernel])
    found: list[SecondLayout] = []
    for pair in combinations(layouts, 2):
        both = [candidate for layout in pair for candidate in layouts[layout]]
        gains = [time_of_fastest(alone, m, decision.basis) / time_of_fastest(both, m, decision.basis) for m in rows]
        chosen = choices(both, kernels, decision.basis)
        held = {c.layout_id: 0 for c in chosen}
        gain = sum(map(log, gains)) / len(rows)
        # A pair without the best layout may lose at some rows more than it gains at others; of one layout alone, what
        # gains lies between the rows that were measured.
        if max(gains) < _WORTH or gain <= 0 or len(held) == 1:
            continue
        for choice in chosen:
            held[choice.layout_id] = max(held[choice.layout_id], bytes_held(problem, asked[choice.kernel]))
        found.append(SecondLayout(replace(decision, choices=chosen, extra_bytes=sum(held.values()) - one), gain))
    return max(found, key=lambda each: (each.gain, -each.decision.extra_bytes), default=None)


def spend(
    policy: Policy,
    layers: Sequence[LayerPlan],
    decisions: Sequence[Decision],
    platform: Platform,
    registry: Registry,
) -> tuple[tuple[LayerPlan, ...], tuple[Decision, ...]]:
    """
    Return a plan's layers and decisions with second layouts for as many layers as a policy's budget allows.

    Who gains most comes first; layers that ask the same get one together or not at all.
    """
    budget = policy.layout_budget
    if budget <= 0:
        return tuple(layers), tuple(decisions)
    found: dict[int, SecondLayout] = {}
    counts: dict[int, int] = {}
    for layer in layers:
        index, problem = layer.decision, layer.problem
        if index is None or problem is None:
            continue
        if index not in counts:
            offer = second_layout(problem, decisions[index], platform, registry, policy.rows)
            if offer is not None:
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
