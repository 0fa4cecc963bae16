"""
The steps around products that packages leave to an engine: putting choices in the order of experts, and adding up.

A choice is one of the M * T entries of the router's ids, counted row by row.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def count(
    ids_ptr, counts_ptr, order_ptr, choices, padded, BINS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Write how many choices of a chunk each expert has, `counts [chunks, BINS]`, and fill `order` with nobody's."""
    within = tl.arange(0, CHUNK)
    mine = tl.program_id(0) * CHUNK + within
    experts = tl.load(ids_ptr + mine, mask=mine < choices, other=BINS - 1)
    tl.store(counts_ptr + tl.program_id(0) * BINS + tl.arange(0, BINS), tl.histogram(experts, BINS))
    for start in range(tl.program_id(0) * CHUNK, padded, tl.num_programs(0) * CHUNK):
        tl.store(order_ptr + start + within, choices, mask=start + within < padded)


@triton.jit
def place(
    ids_ptr, counts_ptr, cursors_ptr, order_ptr, places_ptr, owners_ptr, ends_ptr, total_ptr,
    choices, experts, padded, blocks, chunks,
    ALONE: tl.constexpr, BLOCK_M: tl.constexpr, BINS: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
    OWNERS: tl.constexpr,
):  # fmt: skip
    """
    Write a chunk's choices to their places in `order [padded]`, where each expert's begin at a multiple of BLOCK_M.

    Also every choice's place, every block's expert, every expert's end, and the end of all. `ALONE` is the only chunk,
    and does what `count` does for many. The order among an expert's choices differs from call to call.
    """
    program = tl.program_id(0)
    bins = tl.arange(0, BINS)
    within = tl.arange(0, CHUNK)
    mine = program * CHUNK + within
    chosen = tl.load(ids_ptr + mine, mask=mine < choices, other=BINS - 1)
    if ALONE:
        totals = tl.where(bins < experts, tl.histogram(chosen, BINS), 0)
        before = tl.zeros((BINS,), tl.int32)
        for start in range(0, padded, CHUNK):
            tl.store(order_ptr + start + within, choices, mask=start + within < padded)
    else:
        rows = tl.arange(0, CHUNKS)
        cells = counts_ptr + rows[:, None] * BINS + bins[None, :]
        counts = tl.load(cells, mask=(rows[:, None] < chunks) & (bins[None, :] < experts), other=0)
        totals = tl.sum(counts, 0)
        before = tl.sum(tl.where(rows[:, None] < program, counts, 0), 0)
    filled = (totals + BLOCK_M - 1) // BLOCK_M * BLOCK_M
    ends = tl.cumsum(filled, 0)
    cursors = cursors_ptr + program * BINS
    tl.store(cursors + bins, ends - filled + before)
    tl.debug_barrier()
    where = tl.atomic_add(cursors + chosen, 1, mask=mine < choices)
    tl.store(order_ptr + where, mine, mask=mine < choices)
    tl.store(places_ptr + mine, where, mask=mine < choices)
    for start in range(program * OWNERS, blocks, tl.num_programs(0) * OWNERS):
        block = start + tl.arange(0, OWNERS)
        passed = (ends[None, :] <= block[:, None] * BLOCK_M) & (bins[None, :] < experts)
        tl.store(owners_ptr + block, tl.sum(passed.to(tl.int32), 1), mask=block < blocks)
    if program == 0:
        tl.store(ends_ptr + bins, ends, mask=bins < experts)
        tl.store(total_ptr, tl.sum(filled, 0))


@triton.jit
def gather(
    x_ptr, order_ptr, out_ptr, scales_ptr, top_k, width, QUANTIZE: tl.constexpr, TOP: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the row of x that a choice is of to its place, quantized with a scale of its own where asked to."""
    row = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    source = tl.load(order_ptr + row) // top_k
    x = tl.load(x_ptr + source.to(tl.int64) * width + columns, mask=columns < width, other=0.0)
    _write(x.to(tl.float32), row, columns, out_ptr, scales_ptr, width, QUANTIZE, TOP)


@triton.jit
def activate(
    gate_up_ptr, out_ptr, scales_ptr, width, QUANTIZE: tl.constexpr, TOP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write SiLU of gate times up, quantized with a scale for each row where asked to."""
    row = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    begin = gate_up_ptr + row.to(tl.int64) * 2 * width
    gate = tl.load(begin + columns, mask=columns < width, other=0.0).to(tl.float32)
    up = tl.load(begin + width + columns, mask=columns < width, other=0.0).to(tl.float32)
    _write(gate / (1.0 + tl.exp(-gate)) * up, row, columns, out_ptr, scales_ptr, width, QUANTIZE, TOP)


@triton.jit
def _write(values, row, columns, out_ptr, scales_ptr, width, QUANTIZE: tl.constexpr, TOP: tl.constexpr):
    if QUANTIZE:
        scale = tl.maximum(tl.max(tl.abs(values), 0), 1e-30) / TOP
        values = tl.minimum(tl.maximum(values / scale, -TOP), TOP)
        tl.store(scales_ptr + row, scale)
    cells = out_ptr + row.to(tl.int64) * width + columns
    tl.store(cells, values.to(out_ptr.dtype.element_ty), mask=columns < width)


@triton.jit
def combine(
    out_ptr, weights_ptr, places_ptr, y_ptr, top_k, width, PLACED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Add up what the experts of a row gave, times the router's weights, in float32."""
    row = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for choice in range(row * top_k, row * top_k + top_k):
        source = choice
        if PLACED:
            source = tl.load(places_ptr + choice)
        begin = out_ptr + source.to(tl.int64) * width
        values = tl.load(begin + columns, mask=columns < width, other=0.0).to(tl.float32)
        total += values * tl.load(weights_ptr + choice)
    tl.store(y_ptr + row.to(tl.int64) * width + columns, total.to(y_ptr.dtype.element_ty), mask=columns < width)
