"""
The router's choices in blocks of rows of one expert each.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton

from quantplug_humming.routingdevice import place, route, tally

_LOCKS = 2048
"""Counters by which humming's parts of a sum wait for each other: as many as its own layers have."""

_FEW = 1024
"""Choices that one launch puts in order, for which every program looks at all of them."""

_PIECE, _OWNERS, _CELLS = 1024, 16, 8192
"""Of more choices: those of a program; owners that it writes, and counts of pieces that it adds up, at once."""


class Choices(NamedTuple):
    """
    What a router says: for T experts of each of M rows.

    Attributes:
        ids: contiguous `[M, T]`.
        local: the numbers that a map gives, or None.
        experts: E.
    """

    ids: torch.Tensor
    local: torch.Tensor | None
    experts: int

    @property
    def total(self) -> int:
        """M * T."""
        return self.ids.numel()

    @property
    def mapped(self) -> int:
        """Numbers that the map has."""
        return 0 if self.local is None else self.local.shape[0]


class Blocks(NamedTuple):
    """
    Choices in blocks of rows of one expert each, see `routingdevice.py`.

    Attributes:
        rows: of a block.
        order: the choices, int32.
        owners: the expert of each block, int32.
        total: places that are anybody's, one int32.
        locks: humming's counters, 0.
    """

    rows: int
    order: torch.Tensor
    owners: torch.Tensor
    total: torch.Tensor
    locks: torch.Tensor


def most_blocks(choices: int, experts: int, rows: int) -> int:
    """Return how many blocks of so many rows choices can take at most, however they fall."""
    return min(choices, choices // rows + min(experts, choices))


def to_blocks(choices: Choices, rows: int) -> Blocks:
    """Return choices in blocks of so many rows, by one launch, or two where choices are many."""
    count, experts, many = choices.total, choices.experts, choices.total > _FEW
    blocks, pieces = most_blocks(count, experts, rows), triton.cdiv(count, _PIECE)
    bins = max(64, triton.next_power_of_2(experts + 1))
    # humming reads the order by 16 bytes and wants counters aligned to as many: what may have any length comes last.
    cells = pieces * bins if many else 0
    sizes = [_LOCKS, blocks * rows, blocks, 1, cells, cells]
    scratch = torch.empty(sum(sizes), dtype=torch.int32, device=choices.ids.device)
    locks, order, owners, total, counts, cursors = scratch.split(sizes)
    named, mapped = (choices.ids, choices.local), choices.local is not None
    if many:
        tally[(pieces,)](
            *named, counts, order, count, experts, choices.mapped, len(order),
            MAP=mapped, BINS=bins, BLOCK=_PIECE, num_warps=4,
        )  # fmt: skip
        place[(pieces,)](
            *named, counts, cursors, order, owners, total, locks, count, experts, choices.mapped, rows, blocks,
            MAP=mapped, BINS=bins, BLOCK=_PIECE, PIECES=max(1, _CELLS // bins), OWNERS=_OWNERS, LOCKS=_LOCKS,
            num_warps=4,
        )  # fmt: skip
    else:
        route[(experts + 1,)](
            *named, order, owners, total, locks, count, experts, choices.mapped, rows,
            MAP=mapped, BINS=bins, BLOCK=max(64, triton.next_power_of_2(count)), FILL=triton.next_power_of_2(rows),
            LOCKS=_LOCKS, num_warps=4,
        )  # fmt: skip
    return Blocks(rows, order, owners, total, locks)
