"""
Where each input goes: groups one after the other, each filled up to a multiple of 16 slots, the whole to chunks of 64.

A step of a matrix instruction covers 16 inputs, all of one group, so that scales multiply float32 sums.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from quantplug.spec import PerBlock, PerGroup

if TYPE_CHECKING:
    from quantplug.spec import Granularity

CHUNK = 64
"""Inputs that are loaded and multiplied at a time."""
STEP = 16
"""Inputs of one matrix instruction."""


@dataclass(frozen=True, slots=True)
class Slots:
    """
    The arrangement of K inputs.

    Attributes:
        width: slots of a group; 0 where all inputs share one scale per output.
        groups: number of groups.
        inputs: K.
    """

    width: int
    groups: int
    inputs: int

    @property
    def count(self) -> int:
        """Slots in all, the empty ones included: a multiple of 64."""
        return -(-(self.width * self.groups or self.inputs) // CHUNK) * CHUNK

    @property
    def parts(self) -> int:
        """Parts of a chunk that have a scale of their own: 0 (one scale for all inputs), 1, 2 or 4."""
        if not self.width:
            return 0
        return next(CHUNK // size for size in (CHUNK, CHUNK // 2, STEP) if self.width % size == 0)

    @property
    def per_group(self) -> int:
        """Such parts per group."""
        return self.width * self.parts // CHUNK if self.parts else 1


def arrange(largest: int, groups: int, inputs: int, *, apart: bool = False) -> Slots:
    """
    Return the arrangement of so many groups, and inputs in all.

    Args:
        largest: inputs of the group that has most.
        groups: their number.
        inputs: K.
        apart: whether the scale of a single group is to be held as that of a group, not as that of whole sums.
    """
    if groups == 1 and not apart:
        return Slots(0, 1, inputs)
    return Slots(-(-largest // STEP) * STEP, groups, inputs)


def group_size(granularity: Granularity, in_features: int) -> int:
    """Return the inputs of a group, as they are without act-order; the last one may have fewer."""
    if not isinstance(granularity, (PerGroup, PerBlock)):
        return in_features
    return min(in_features, granularity.size if isinstance(granularity, PerGroup) else granularity.k)


def arrange_in_order(granularity: Granularity, in_features: int, *, apart: bool = False) -> Slots:
    """Return the arrangement of inputs without act-order."""
    size = group_size(granularity, in_features)
    return arrange(size, -(-in_features // size), in_features, apart=apart)
