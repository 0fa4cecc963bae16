"""
Where each input goes: groups one after the other, each filled up to whole chunks of slots that share a scale.

A chunk is what one product of a tile covers. All its slots belong to one group, so that the product is multiplied by
one scale per row, and codes are multiplied exactly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from quantplug.spec import PerBlock, PerGroup

if TYPE_CHECKING:
    from collections.abc import Sequence

    from quantplug.spec import Granularity

CHUNKS = (64, 32, 16)
"""Slots per chunk, the widest first; no tile product is narrower than 16."""


@dataclass(frozen=True, slots=True)
class Slots:
    """
    The arrangement of K inputs.

    Attributes:
        chunk: slots per chunk.
        per_group: chunks per group; every group takes as many as the largest needs.
        groups: number of groups.
        fields: codes per byte; whole bytes' worth of chunks are stored, empty ones at the end.
    """

    chunk: int
    per_group: int
    groups: int
    fields: int

    @property
    def count(self) -> int:
        """Slots in all, the empty ones included: a multiple of `chunk * fields`."""
        unit = self.chunk * self.fields
        return -(-self.chunk * self.per_group * self.groups // unit) * unit


def arrange(sizes: Sequence[int], fields: int) -> Slots:
    """
    Return the arrangement of groups of these sizes (inputs each), with so many codes to a byte.

    The widest chunk that leaves no slot empty is taken, or the one that leaves fewest.
    """
    largest = max(sizes)
    choices = [Slots(chunk, max(1, -(-largest // chunk)), len(sizes), fields) for chunk in CHUNKS]
    return min(choices, key=lambda slots: slots.count)


def group_sizes(granularity: Granularity, in_features: int) -> list[int]:
    """Return the inputs of each group, as they are without act-order."""
    if not isinstance(granularity, (PerGroup, PerBlock)):
        return [in_features]
    size = granularity.size if isinstance(granularity, PerGroup) else granularity.k
    return [min(size, in_features - start) for start in range(0, in_features, size)]
