"""
The code for experts that runs on the device: four launches, none of which waits for the host.

`route` puts the choices of all rows in the order of experts and cuts each expert's into blocks; `gate_and_up` and
`down` multiply a block with its expert's weights; `combine` adds up what the experts of each row gave. A choice is one
of the M * T entries of the router's ids, counted row by row.
"""

from __future__ import annotations

import triton
import triton.language as tl

from quantplug_triton.device import sums


@triton.jit
def _local(ids_ptr, map_ptr, choices, count, experts, mapped, MAP: tl.constexpr):
    """Return int32 numbers of the experts that choices name; `experts` for those that are nobody's here."""
    numbers = tl.load(ids_ptr + choices, mask=choices < count, other=-1)
    if MAP:
        known = (numbers >= 0) & (numbers < mapped)
        numbers = tl.load(map_ptr + numbers, mask=known, other=-1)
    return tl.where((numbers >= 0) & (numbers < experts), numbers, experts).to(tl.int32)


@triton.jit
def route(
    ids_ptr, map_ptr, order_ptr, blocks_ptr, count, experts, mapped, blocks,
    MAP: tl.constexpr, BLOCK_M: tl.constexpr, BINS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """
    Write the choices of one expert, in their order, into `order [count]`, and its blocks into `blocks [3, blocks]`.

    A block is an expert, its first place in `order` and the end of the expert's places. Every program counts the
    choices of all experts by itself, so that none waits for another. One program more than there are experts marks what
    is left of the blocks as nobody's.
    """
    expert = tl.program_id(0)
    numbers = tl.arange(0, BINS)
    within = tl.arange(0, BLOCK)
    counts = tl.zeros((BINS,), tl.int32)
    for start in range(0, count, BLOCK):
        counts += tl.histogram(_local(ids_ptr, map_ptr, start + within, count, experts, mapped, MAP), BINS)
    place = tl.sum(tl.where(numbers < expert, counts, 0))
    block = tl.sum(tl.where(numbers < expert, (counts + BLOCK_M - 1) // BLOCK_M, 0))
    if expert == experts:
        for start in range(block, blocks, BLOCK):
            tl.store(blocks_ptr + start + within, -1, mask=start + within < blocks)
    else:
        mine = tl.sum(tl.where(numbers == expert, counts, 0))
        end = place + mine
        for start in range(0, mine, BLOCK_M * BLOCK):
            firsts = start + within * BLOCK_M
            cells = blocks_ptr + block + firsts // BLOCK_M
            tl.store(cells, expert, mask=firsts < mine)
            tl.store(cells + blocks, place + firsts, mask=firsts < mine)
            tl.store(cells + 2 * blocks, end, mask=firsts < mine)
        if mine > 0:
            for start in range(0, count, BLOCK):
                local = _local(ids_ptr, map_ptr, start + within, count, experts, mapped, MAP)
                hits = (local == expert).to(tl.int32)
                tl.store(order_ptr + place + tl.cumsum(hits, 0) - 1, start + within, mask=hits > 0)
                place += tl.sum(hits)


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
def _finished(total, factor_ptr, bias_ptr, weight, turns, rows, inside,
              FACTOR: tl.constexpr, BIAS: tl.constexpr, ON_INPUT: tl.constexpr):  # fmt: skip
    """Return sums times the global scale of each row's projection and the router's weight of x, plus the bias."""
    if FACTOR:
        total *= tl.load(factor_ptr + turns)[None, :]
    if ON_INPUT:
        total *= weight[:, None]
    if BIAS:
        total += tl.load(bias_ptr + rows, mask=inside, other=0.0).to(tl.float32)[None, :]
    return total


@triton.jit
def gate_and_up(
    x_ptr, weights_ptr, order_ptr, blocks_ptr, codes_ptr, scales_ptr, zeros_ptr, columns_ptr, factor_ptr, bias_ptr,
    h_ptr, blocks, top_k, K, width, chunks, groups, per_group, rows_per_scale, scale_columns,
    stride_xm, stride_xk, expert_codes, expert_scales, expert_columns, limit, alpha, up_offset,
    KIND: tl.constexpr, BITS: tl.constexpr, MIDDLE: tl.constexpr, CHUNK: tl.constexpr, COLUMNS: tl.constexpr,
    FACTOR: tl.constexpr, BIAS: tl.constexpr, ON_INPUT: tl.constexpr, EXACT: tl.constexpr, ONE_GROUP: tl.constexpr,
    PARTS: tl.constexpr, TURNS: tl.constexpr, NAME: tl.constexpr, LIMITED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TILE_ROWS: tl.constexpr,
):  # fmt: skip
    """
    Compute a tile of h `[M * T, I]`, in the order of experts, see `expertprepare.py` for the tensors.

    Rows of gate and up take turns in one matrix (`TURNS` 2), so that a tile of sums holds both of each output. Where
    each has an order of inputs of its own, they are `PARTS` that are summed up one after the other. `expert_…` are
    what lies between the tensors of two experts, or of two parts.
    """
    block = tl.program_id(1)
    expert = tl.load(blocks_ptr + block)
    if expert < 0:
        return
    places = tl.load(blocks_ptr + blocks + block) + tl.arange(0, BLOCK_M)
    present = places < tl.load(blocks_ptr + 2 * blocks + block)
    choices = tl.load(order_ptr + places, mask=present, other=0)
    x_rows = x_ptr + (choices // top_k).to(tl.int64) * stride_xm
    weight = 1.0
    if ON_INPUT:
        weight = tl.load(weights_ptr + choices, mask=present, other=0.0)
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    held = width * TURNS
    part = expert.to(tl.int64) * PARTS
    projections: tl.constexpr = PARTS * TURNS
    total = sums(
        x_rows, present, stride_xk, K, codes_ptr + part * expert_codes, scales_ptr + part * expert_scales,
        zeros_ptr + part * expert_scales, columns_ptr + part * expert_columns, rows, held, chunks, 0, chunks,
        groups, per_group, rows_per_scale, scale_columns,
        KIND, BITS, MIDDLE, CHUNK, COLUMNS, EXACT, ONE_GROUP, TURNS, BLOCK_M, BLOCK_N, TILE_ROWS,
    )  # fmt: skip
    factors = factor_ptr + expert * projections
    biases = bias_ptr + expert * projections * width
    total = _finished(total, factors, biases, weight, rows % TURNS, rows, rows < held, FACTOR, BIAS, ON_INPUT)
    if TURNS == 2:
        gate, up = tl.split(tl.reshape(total, (BLOCK_M, BLOCK_N // 2, 2)))
    else:
        gate = total
        up = total
    if PARTS == 2:
        up = sums(
            x_rows, present, stride_xk, K, codes_ptr + (part + 1) * expert_codes,
            scales_ptr + (part + 1) * expert_scales, zeros_ptr + (part + 1) * expert_scales,
            columns_ptr + (part + 1) * expert_columns, rows, held, chunks, 0, chunks,
            groups, per_group, rows_per_scale, scale_columns,
            KIND, BITS, MIDDLE, CHUNK, COLUMNS, EXACT, ONE_GROUP, TURNS, BLOCK_M, BLOCK_N, TILE_ROWS,
        )  # fmt: skip
        up = _finished(up, factors + 1, biases + width, weight, rows % TURNS, rows, rows < held, FACTOR, BIAS, ON_INPUT)
    if projections == 2:
        if LIMITED:
            gate = tl.minimum(gate, limit)
            up = tl.minimum(tl.maximum(up, -limit), limit)
        h = _named(gate, alpha, NAME) * (up + up_offset)
    else:
        h = _named(gate, alpha, NAME)
    outputs = tl.program_id(0) * (BLOCK_N // TURNS) + tl.arange(0, BLOCK_N // TURNS)
    h_ptrs = h_ptr + places.to(tl.int64)[:, None] * width + outputs[None, :]
    tl.store(h_ptrs, h.to(h_ptr.dtype.element_ty), mask=present[:, None] & (outputs < width)[None, :])


@triton.jit
def down(
    h_ptr, order_ptr, blocks_ptr, codes_ptr, scales_ptr, zeros_ptr, columns_ptr, o_ptr,
    blocks, K, N, chunks, chunks_per_split, groups, per_group, rows_per_scale, scale_columns,
    expert_codes, expert_scales, expert_columns, stride_split,
    KIND: tl.constexpr, BITS: tl.constexpr, MIDDLE: tl.constexpr, CHUNK: tl.constexpr, COLUMNS: tl.constexpr,
    EXACT: tl.constexpr, ONE_GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TILE_ROWS: tl.constexpr,
):  # fmt: skip
    """
    Compute a tile of float32 o `[M * T, N]`, in the order of choices, or one share of it.

    Global scale and bias are left to `combine`.
    """
    block = tl.program_id(1)
    expert = tl.load(blocks_ptr + block)
    if expert < 0:
        return
    places = tl.load(blocks_ptr + blocks + block) + tl.arange(0, BLOCK_M)
    present = places < tl.load(blocks_ptr + 2 * blocks + block)
    choices = tl.load(order_ptr + places, mask=present, other=0)
    outputs = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    share = tl.program_id(2)
    first = share * chunks_per_split
    last = tl.minimum(first + chunks_per_split, chunks)
    part = expert.to(tl.int64)
    total = sums(
        h_ptr + places.to(tl.int64) * K, present, 1, K, codes_ptr + part * expert_codes,
        scales_ptr + part * expert_scales, zeros_ptr + part * expert_scales, columns_ptr + part * expert_columns,
        outputs, N, chunks, first, last, groups, per_group, rows_per_scale, scale_columns,
        KIND, BITS, MIDDLE, CHUNK, COLUMNS, EXACT, ONE_GROUP, 1, BLOCK_M, BLOCK_N, TILE_ROWS,
    )  # fmt: skip
    o_ptrs = o_ptr + share.to(tl.int64) * stride_split + choices.to(tl.int64)[:, None] * N + outputs[None, :]
    tl.store(o_ptrs, total, mask=present[:, None] & (outputs < N)[None, :])


@triton.jit
def combine(
    o_ptr, ids_ptr, map_ptr, weights_ptr, factor_ptr, bias_ptr, y_ptr,
    top_k, count, experts, mapped, N, stride_split,
    MAP: tl.constexpr, SHARES: tl.constexpr, FACTOR: tl.constexpr, BIAS: tl.constexpr, ON_INPUT: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Add up a row's experts, shares first, always in the same order, and write y `[M, N]`."""
    row = tl.program_id(0)
    outputs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = outputs < N
    total = tl.zeros((BLOCK,), tl.float32)
    for turn in range(top_k):
        # One choice as a vector: the interpreter knows no mask of a single number.
        choice = row * top_k + turn + tl.arange(0, 1)
        expert = _local(ids_ptr, map_ptr, choice, count, experts, mapped, MAP)
        here = expert < experts
        value = tl.zeros((BLOCK,), tl.float32)
        for share in tl.static_range(SHARES):
            o_ptrs = o_ptr + share * stride_split + choice.to(tl.int64) * N + outputs
            value += tl.load(o_ptrs, mask=inside & here, other=0.0)
        if FACTOR:
            value *= tl.load(factor_ptr + expert, mask=here, other=0.0)
        if BIAS:
            value += tl.load(bias_ptr + expert.to(tl.int64) * N + outputs, mask=inside & here, other=0.0).to(tl.float32)
        if not ON_INPUT:
            value *= tl.load(weights_ptr + choice, mask=here, other=0.0)
        total += value
    tl.store(y_ptr + tl.cast(row, tl.int64) * N + outputs, total.to(y_ptr.dtype.element_ty), mask=inside)
