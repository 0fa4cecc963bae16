"""
Where the inputs of a weight go in the packed layout, from its groups as they are.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from quantplug.spec import PerGroup
from quantplug_cpu.slots import Slots, arrange, group_sizes, stays_in_order

if TYPE_CHECKING:
    from collections.abc import Sequence

    from quantplug.spec import Granularity
    from quantplug.weight import Weight


@dataclass(frozen=True, slots=True)
class Inputs:
    """
    Where the inputs of a weight go.

    Attributes:
        slots: the arrangement.
        groups: int64 `[S / q]`, the weight's group that each of the operator's groups belongs to.
        sources: int64 `[S]`, the input in each slot and K in empty ones; None when inputs stay in order.
    """

    slots: Slots
    groups: torch.Tensor
    sources: torch.Tensor | None


def arrange_inputs(granularity: Granularity, k: int, g_idx: torch.Tensor | None, groups: int) -> Inputs:
    """Return where K inputs go that belong to G groups, evenly or as `g_idx` says."""
    if g_idx is None:
        slots = arrange(group_sizes(granularity, k))
        size = granularity.size if isinstance(granularity, PerGroup) else k
        if stays_in_order(granularity, k, slots):
            return Inputs(slots, torch.arange(slots.groups) * slots.group // size, None)
        index = torch.arange(k) // size
    else:
        index = g_idx.to(torch.int64)
    order = torch.argsort(index, stable=True)
    counts = torch.bincount(index, minlength=groups)
    sizes = Counter(counts.tolist())
    del sizes[0]
    slots = arrange(sizes)
    needed = (counts + slots.group - 1) // slots.group
    # The j-th input of a group goes to the j-th slot of that group.
    starts = (needed.cumsum(0) - needed) * slots.group - (counts.cumsum(0) - counts)
    sources = torch.full((slots.count,), k)
    sources[starts[index[order]] + torch.arange(k)] = order
    moved = not torch.equal(sources, torch.arange(k))
    return Inputs(slots, torch.repeat_interleave(needed), sources if moved else None)


def share_order(segments: Sequence[Weight]) -> list[Sequence[Weight]]:
    """Return the segments as one part when all read their inputs in one order, else one part each."""
    first = segments[0].g_idx
    for weight in segments[1:]:
        other = weight.g_idx
        same = first is None if other is None else first is not None and torch.equal(first, other)
        if not same or weight.scales.shape[1] != segments[0].scales.shape[1]:
            return [(weight,) for weight in segments]
    return [segments]
