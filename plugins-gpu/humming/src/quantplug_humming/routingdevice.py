"""
What Triton compiles to put choices in the order of experts, in blocks of rows of one expert each, as humming's indexed
product wants them.

A choice is one of the M * T entries of the router's ids, counted row by row. `order` holds the choices of each block,
filled up with M * T; `owners` the expert of each block; `total` the places in blocks that are anybody's.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def local_of(ids_ptr, map_ptr, choices, count, experts, mapped, MAP: tl.constexpr):
    """Return int32 numbers of the experts that choices name; `experts` for those that are nobody's here."""
    numbers = tl.load(ids_ptr + choices, mask=choices < count, other=-1)
    if MAP:
        known = (numbers >= 0) & (numbers < mapped)
        numbers = tl.load(map_ptr + numbers, mask=known, other=-1)
    return tl.where((numbers >= 0) & (numbers < experts), numbers, experts).to(tl.int32)


@triton.jit
def route(
    ids_ptr, map_ptr, order_ptr, owners_ptr, total_ptr, locks_ptr, count, experts, mapped, rows,
    MAP: tl.constexpr, BINS: tl.constexpr, BLOCK: tl.constexpr, FILL: tl.constexpr, LOCKS: tl.constexpr,
):  # fmt: skip
    """
    Put few choices in order: a program does so for one expert's, and counts those of all experts by itself.

    One program more than there are experts writes the total, and the zeros that humming's counters begin with.
    """
    expert = tl.program_id(0)
    numbers = tl.arange(0, BINS)
    within = tl.arange(0, BLOCK)
    local = local_of(ids_ptr, map_ptr, within, count, experts, mapped, MAP)
    blocks = tl.where(numbers < experts, (tl.histogram(local, BINS) + rows - 1) // rows, 0)
    if expert == experts:
        tl.store(total_ptr, tl.sum(blocks) * rows)
        tl.store(locks_ptr + tl.arange(0, LOCKS), 0)
    else:
        block = tl.sum(tl.where(numbers < expert, blocks, 0))
        own = tl.sum(tl.where(numbers == expert, blocks, 0))
        if own > 0:
            tl.store(owners_ptr + block + within, expert, mask=within < own)
            place = block * rows
            hits = (local == expert).to(tl.int32)
            tl.store(order_ptr + place + tl.cumsum(hits, 0) - 1, within, mask=hits > 0)
            rest = place + tl.sum(hits) + tl.arange(0, FILL)
            tl.store(order_ptr + rest, count, mask=rest < place + own * rows)


@triton.jit
def tally(
    ids_ptr, map_ptr, counts_ptr, order_ptr, count, experts, mapped, places,
    MAP: tl.constexpr, BINS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write how many choices of a piece name each expert, `counts [pieces, BINS]`, and fill up a share of `order`."""
    piece, within = tl.program_id(0), tl.arange(0, BLOCK)
    local = local_of(ids_ptr, map_ptr, piece * BLOCK + within, count, experts, mapped, MAP)
    tl.store(counts_ptr + piece * BINS + tl.arange(0, BINS), tl.histogram(local, BINS))
    for start in range(piece * BLOCK, places, tl.num_programs(0) * BLOCK):
        tl.store(order_ptr + start + within, count, mask=start + within < places)


@triton.jit
def place(
    ids_ptr, map_ptr, counts_ptr, cursors_ptr, order_ptr, owners_ptr, total_ptr, locks_ptr,
    count, experts, mapped, rows, blocks,
    MAP: tl.constexpr, BINS: tl.constexpr, BLOCK: tl.constexpr, PIECES: tl.constexpr, OWNERS: tl.constexpr,
    LOCKS: tl.constexpr,
):  # fmt: skip
    """
    Put the choices of a piece in order, behind those of the pieces before it, as `tally` counted them.

    Which of a piece's choices of one expert comes first differs from call to call: no row's result depends on it. Each
    program also writes the owners of a share of the `blocks` that there may be, and the first one what is left.
    """
    piece, numbers = tl.program_id(0), tl.arange(0, BINS)
    counts, before = tl.zeros((BINS,), tl.int32), tl.zeros((BINS,), tl.int32)
    for start in range(0, tl.num_programs(0), PIECES):
        pieces = start + tl.arange(0, PIECES)
        cells = counts_ptr + pieces[:, None] * BINS + numbers[None, :]
        found = tl.load(cells, mask=(pieces < tl.num_programs(0))[:, None], other=0)
        counts += tl.sum(found, 0)
        before += tl.sum(tl.where((pieces < piece)[:, None], found, 0), 0)
    own = tl.where(numbers < experts, (counts + rows - 1) // rows, 0)
    ends = tl.cumsum(own, 0)
    cursors = cursors_ptr + piece * BINS
    tl.store(cursors + numbers, (ends - own) * rows + before)
    choices = piece * BLOCK + tl.arange(0, BLOCK)
    local = local_of(ids_ptr, map_ptr, choices, count, experts, mapped, MAP)
    tl.debug_barrier()  # cursors are written by other threads than those that move them
    found = tl.atomic_add(cursors + local, 1, mask=local < experts)
    tl.store(order_ptr + found, choices, mask=local < experts)
    for start in range(piece * OWNERS, blocks, tl.num_programs(0) * OWNERS):
        which = start + tl.arange(0, OWNERS)
        passed = (ends[None, :] <= which[:, None]) & (numbers < experts)[None, :]
        tl.store(owners_ptr + which, tl.sum(passed.to(tl.int32), 1), mask=which < blocks)
    if piece == 0:
        tl.store(total_ptr, tl.sum(own) * rows)
        tl.store(locks_ptr + tl.arange(0, LOCKS), 0)
