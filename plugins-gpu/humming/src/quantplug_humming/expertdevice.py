"""
What Triton compiles around humming's two products: routing, the function between them, and the sum over experts.

A choice is one of the M * T entries of the router's ids, counted row by row.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _local(ids_ptr, map_ptr, choices, count, experts, mapped, MAP: tl.constexpr):
    """Return int32 numbers of the experts that choices name; `experts` for those that are nobody's here."""
    numbers = tl.load(ids_ptr + choices, mask=choices < count, other=-1)
    if MAP:
        known = (numbers >= 0) & (numbers < mapped)
        numbers = tl.load(map_ptr + numbers, mask=known, other=-1)
    return tl.where((numbers >= 0) & (numbers < experts), numbers, experts).to(tl.int32)


@triton.jit
def tally(ids_ptr, map_ptr, counts_ptr, count, experts, mapped, MAP: tl.constexpr, BLOCK: tl.constexpr):
    """Write how many choices name each expert: a program counts its own, which is less work than counting all."""
    expert = tl.program_id(0)
    hits = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, count, BLOCK):
        local = _local(ids_ptr, map_ptr, start + tl.arange(0, BLOCK), count, experts, mapped, MAP)
        hits += (local == expert).to(tl.int32)
    tl.store(counts_ptr + expert, tl.sum(hits))


@triton.jit
def route(
    ids_ptr, map_ptr, counts_ptr, order_ptr, owners_ptr, total_ptr, locks_ptr, count, experts, mapped, rows,
    MAP: tl.constexpr, TALLIED: tl.constexpr, BINS: tl.constexpr, BLOCK: tl.constexpr, FILL: tl.constexpr,
    LOCKS: tl.constexpr,
):  # fmt: skip
    """
    Put choices in the order of experts, in blocks of `rows` of one expert each, as humming's indexed product wants it.

    `order` holds the choices of each block, filled up with `count`; `owners` the expert of each block; `total` the
    places in blocks that are anybody's. Where choices fit into one go, every program counts those of all experts by
    itself; otherwise `tally` did. One program more than there are experts writes the total, and the zeros that
    humming's counters begin with.
    """
    expert = tl.program_id(0)
    numbers = tl.arange(0, BINS)
    within = tl.arange(0, BLOCK)
    if TALLIED:
        counts = tl.load(counts_ptr + numbers, mask=numbers < experts, other=0)
    else:
        counts = tl.histogram(_local(ids_ptr, map_ptr, within, count, experts, mapped, MAP), BINS)
    blocks = tl.where(numbers < experts, (counts + rows - 1) // rows, 0)
    if expert == experts:
        tl.store(total_ptr, tl.sum(blocks) * rows)
        tl.store(locks_ptr + tl.arange(0, LOCKS), 0)
    else:
        block = tl.sum(tl.where(numbers < expert, blocks, 0))
        own = tl.sum(tl.where(numbers == expert, blocks, 0))
        if own > 0:
            for start in range(0, own, BLOCK):
                tl.store(owners_ptr + block + start + within, expert, mask=start + within < own)
            place = block * rows
            end = place + own * rows
            for start in range(0, count, BLOCK):
                local = _local(ids_ptr, map_ptr, start + within, count, experts, mapped, MAP)
                hits = (local == expert).to(tl.int32)
                tl.store(order_ptr + place + tl.cumsum(hits, 0) - 1, start + within, mask=hits > 0)
                place += tl.sum(hits)
            rest = place + tl.arange(0, FILL)
            tl.store(order_ptr + rest, count, mask=rest < end)


@triton.jit
def _sigmoid(z):
    return 1.0 / (1.0 + tl.exp(-z))


@triton.jit
def _named(z, alpha, NAME: tl.constexpr):
    """Return the function called NAME of float32 values, see `quantplug.moe`."""
    if NAME == "silu":
        result = z * _sigmoid(alpha * z)
    elif NAME == "gelu":
        result = 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
    elif NAME == "gelu_tanh":
        # (1 + tanh(t / 2)) / 2 is the sigmoid of t.
        result = z * _sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))
    else:
        tl.static_assert(NAME == "relu" or NAME == "relu2")
        result = tl.maximum(z, 0.0)
        if NAME == "relu2":
            result = result * result
    return result


@triton.jit
def between(
    product_ptr, ids_ptr, map_ptr, h_ptr, count, experts, mapped, width, limit, alpha, up_offset,
    MAP: tl.constexpr, GATED: tl.constexpr, LIMITED: tl.constexpr, NAME: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write `h [M * T, width]`, f of the first product `[M * T, width or 2 width]`, for choices that are anybody's."""
    choice = tl.program_id(0)
    here = _local(ids_ptr, map_ptr, choice + tl.arange(0, 1), count, experts, mapped, MAP) < experts
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = here & (columns < width)
    row = tl.cast(choice, tl.int64) * width
    if GATED:
        gate = tl.load(product_ptr + 2 * row + columns, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(product_ptr + 2 * row + width + columns, mask=inside, other=0.0).to(tl.float32)
        if LIMITED:
            gate = tl.minimum(gate, limit)
            up = tl.minimum(tl.maximum(up, -limit), limit)
        h = _named(gate, alpha, NAME) * (up + up_offset)
    else:
        h = _named(tl.load(product_ptr + row + columns, mask=inside, other=0.0).to(tl.float32), alpha, NAME)
    tl.store(h_ptr + row + columns, h.to(h_ptr.dtype.element_ty), mask=inside)


@triton.jit
def combine(
    product_ptr, ids_ptr, map_ptr, weights_ptr, y_ptr, count, experts, mapped, width, outputs,
    MAP: tl.constexpr, TOP_K: tl.constexpr, ON_INPUT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Add up what the experts of a row gave, always in the same order, and write y `[M, outputs]`."""
    row = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < outputs
    total = tl.zeros((BLOCK,), tl.float32)
    for turn in tl.static_range(TOP_K):
        # One choice as a vector: the interpreter knows no mask of a single number.
        choice = row * TOP_K + turn + tl.arange(0, 1)
        here = _local(ids_ptr, map_ptr, choice, count, experts, mapped, MAP) < experts
        given = product_ptr + choice.to(tl.int64) * width + columns
        value = tl.load(given, mask=inside & here, other=0.0).to(tl.float32)
        if not ON_INPUT:
            value *= tl.load(weights_ptr + choice, mask=here, other=0.0)
        total += value
    tl.store(y_ptr + tl.cast(row, tl.int64) * outputs + columns, total.to(y_ptr.dtype.element_ty), mask=inside)
