"""
How inputs are laid out for the packed int4 operator, as arithmetic.

The operator takes groups of 32, 64, 128 or 256 inputs, all of one size, each with its own scale. A weight's group gets
as many of them as it needs; what it does not fill stays empty: a slot whose x is 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from quantplug.spec import PerGroup

if TYPE_CHECKING:
    from collections.abc import Mapping

    from quantplug.spec import Granularity

OPERATOR_GROUPS = (256, 128, 64, 32)
"""Group sizes that the operator takes."""

ROWS = 64
"""Rows are filled up to a multiple of this, a whole number of blocks in every layout the operator has."""


@dataclass(frozen=True, slots=True)
class Slots:
    """
    The inputs of a layer as the operator sees them.

    Attributes:
        group: inputs that share a scale there.
        count: inputs in all, the empty ones included; a multiple of `group`.
    """

    group: int
    count: int

    @property
    def groups(self) -> int:
        """Number of the operator's groups."""
        return self.count // self.group


def arrange(sizes: Mapping[int, int]) -> Slots:
    """
    Return the arrangement with the fewest slots, of those the one with the largest groups.

    Args:
        sizes: how many groups there are of each size, the weight's own groups.
    """
    best = Slots(OPERATOR_GROUPS[0], _count(sizes, OPERATOR_GROUPS[0]))
    for group in OPERATOR_GROUPS[1:]:
        count = _count(sizes, group)
        if count < best.count:
            best = Slots(group, count)
    return best


def group_sizes(granularity: Granularity, in_features: int) -> dict[int, int]:
    """Return how many groups of each size a weight has when inputs are spread evenly."""
    size = granularity.size if isinstance(granularity, PerGroup) else in_features
    sizes = {size: in_features // size} if in_features >= size else {}
    if in_features % size:
        sizes[in_features % size] = 1
    return sizes


def stays_in_order(granularity: Granularity, in_features: int, slots: Slots) -> bool:
    """Return whether inputs spread evenly can stay where they are, with empty slots at the end only."""
    size = granularity.size if isinstance(granularity, PerGroup) else in_features
    return size >= in_features or size % slots.group == 0


def filled(rows: int) -> int:
    """Return the number of rows, the empty ones included."""
    return -(-rows // ROWS) * ROWS


def _count(sizes: Mapping[int, int], group: int) -> int:
    return sum(number * -(-size // group) * group for size, number in sizes.items())
