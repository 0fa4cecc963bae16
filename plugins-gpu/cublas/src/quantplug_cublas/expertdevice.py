"""
The code for experts that runs on the device, around torch's grouped products.

A choice is one of the M * T entries of the router's ids, counted row by row. Choices are put in the order of the
experts, each expert's in their own order, and those that name nobody last: `places [M * T]` says where each went.
"""

from __future__ import annotations

import triton
import triton.language as tl

from quantplug_cublas.device import _codes, _inverse, _scale


@triton.jit
def _located(counts, before, places_ptr, ends_ptr, choices, local, ranks, count, experts, first,
             TURNS: tl.constexpr, BINS: tl.constexpr):  # fmt: skip
    """Write the places of choices and, if `first`, where the groups end, of `counts` of all experts' choices."""
    bins = tl.arange(0, BINS)
    ends = tl.cumsum(counts, 0)
    firsts = ends - counts + before
    tl.store(places_ptr + choices, tl.gather(firsts, local, 0) + ranks, mask=choices < count)
    if first:
        here = tl.sum(tl.where(bins < experts, counts, 0), 0)
        for turn in tl.static_range(TURNS):
            tl.store(ends_ptr + turn * experts + bins, turn * here + ends, mask=bins < experts)


@triton.jit
def rank(
    ids_ptr, map_ptr, local_ptr, places_ptr, counts_ptr, ends_ptr, count, experts, mapped,
    MAP: tl.constexpr, ALONE: tl.constexpr, TURNS: tl.constexpr, BINS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """
    Write int32 numbers of the experts that a block of choices name, `experts` for nobody's, each one's place among
    those of the block that name the same, and how often each expert is named there: `counts [blocks, BINS]`.

    A block that is `ALONE` is done: places are those of all choices, and `ends` those of the groups.
    """
    block = tl.program_id(0)
    within = tl.arange(0, BLOCK)
    choices = block * BLOCK + within
    numbers = tl.load(ids_ptr + choices, mask=choices < count, other=-1)
    if MAP:
        known = (numbers >= 0) & (numbers < mapped)
        numbers = tl.load(map_ptr + numbers, mask=known, other=-1)
    local = tl.where((numbers >= 0) & (numbers < experts), numbers, experts).to(tl.int32)
    alike = (local[:, None] == local[None, :]) & (within[None, :] < within[:, None])
    ranks = tl.sum(alike.to(tl.int32), 1)
    counts = tl.histogram(local, BINS)
    tl.store(local_ptr + choices, local, mask=choices < count)
    if ALONE:
        _located(
            counts, tl.zeros_like(counts), places_ptr, ends_ptr, choices, local, ranks, count, experts, True,
            TURNS, BINS,
        )  # fmt: skip
    else:
        tl.store(places_ptr + choices, ranks, mask=choices < count)
        tl.store(counts_ptr + block * BINS + tl.arange(0, BINS), counts)


@triton.jit
def locate(
    local_ptr, places_ptr, counts_ptr, ends_ptr, count, experts, blocks,
    TURNS: tl.constexpr, BINS: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Turn places within a block of choices into those among all, and write where groups end, `ends [TURNS * E]`."""
    block = tl.program_id(0)
    choices = block * BLOCK + tl.arange(0, BLOCK)
    rows, bins = tl.arange(0, ROWS), tl.arange(0, BINS)
    counts = tl.zeros((BINS,), tl.int32)
    before = tl.zeros((BINS,), tl.int32)
    for start in range(0, blocks, ROWS):
        numbers = start + rows
        cells = counts_ptr + numbers[:, None] * BINS + bins[None, :]
        found = tl.load(cells, mask=(numbers < blocks)[:, None], other=0)
        counts += tl.sum(found, 0)
        before += tl.sum(tl.where((numbers < block)[:, None], found, 0), 0)
    local = tl.load(local_ptr + choices, mask=choices < count, other=0)
    ranks = tl.load(places_ptr + choices, mask=choices < count, other=0)
    _located(counts, before, places_ptr, ends_ptr, choices, local, ranks, count, experts, block == 0, TURNS, BINS)


@triton.jit
def _largest(x_row, weight, K, stride, PIECES: tl.constexpr, BLOCK: tl.constexpr):
    """Return the largest magnitude of a row times `weight`."""
    largest = tl.zeros((BLOCK,), tl.float32)
    for piece in range(PIECES):
        inputs = piece * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(x_row + inputs.to(tl.int64) * stride, mask=inputs < K, other=0.0).to(tl.float32) * weight
        largest = tl.maximum(largest, tl.abs(x))
    return tl.max(largest, 0)


@triton.jit
def quantize_choices(
    x_ptr, weights_ptr, known_ptr, local_ptr, places_ptr, ends_ptr, codes_ptr, scales_ptr,
    experts, K, width, stride_xm, stride_xk,
    TOP_K: tl.constexpr, ON_INPUT: tl.constexpr, STATIC: tl.constexpr, TURNS: tl.constexpr,
    TOP: tl.constexpr, LEAST: tl.constexpr, PIECES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """
    Quantize a row of x `[M, K]` for each of its choices: codes `[TURNS * M * T, width]`, 0 behind K, and scales.

    The scale is the row's own, or with `STATIC` that of the expert, `known [TURNS, E]`.
    """
    row = tl.program_id(0).to(tl.int64)
    x_row = x_ptr + row * stride_xm
    weight = 1.0
    if ON_INPUT:
        weight = tl.load(weights_ptr + row)
    here = tl.load(ends_ptr + experts - 1)
    if not STATIC:
        scale = _scale(_largest(x_row, weight, K, stride_xk, PIECES, BLOCK), TOP, LEAST)
    for piece in range(PIECES):
        inputs = piece * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(x_row + inputs.to(tl.int64) * stride_xk, mask=inputs < K, other=0.0).to(tl.float32) * weight
        if not STATIC:
            codes = _codes(x, _inverse(scale), TOP).to(codes_ptr.dtype.element_ty)
        for number in tl.static_range(TOP_K):
            expert = tl.load(local_ptr + row * TOP_K + number)
            if expert < experts:
                for turn in tl.static_range(TURNS):
                    place = turn * here + tl.load(places_ptr + row * TOP_K + number)
                    cells = codes_ptr + place.to(tl.int64) * width + inputs
                    if STATIC:
                        known = tl.load(known_ptr + turn * experts + expert)
                        tl.store(scales_ptr + place, known)
                        quotient = tl.div_rn(x, tl.zeros_like(x) + known)
                        tl.store(cells, _codes(quotient, 1.0, TOP).to(codes_ptr.dtype.element_ty), mask=inputs < width)
                    else:
                        tl.store(scales_ptr + place, scale)
                        tl.store(cells, codes, mask=inputs < width)


@triton.jit
def _named(z, alpha, NAME: tl.constexpr):
    """Return the function called NAME of float32 values, see `quantplug.moe`."""
    if NAME == "silu":
        result = z / (1.0 + tl.exp(-alpha * z))
    elif NAME == "gelu":
        result = 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
    elif NAME == "gelu_tanh":
        # (1 + tanh(t / 2)) / 2 is the sigmoid of t.
        result = z / (1.0 + tl.exp(-1.5957691216057308 * (z + 0.044715 * z * z * z)))
    else:
        tl.static_assert(NAME == "relu" or NAME == "relu2")
        result = tl.maximum(z, 0.0)
        if NAME == "relu2":
            result = result * result
    return result


@triton.jit
def _between(gate_row, up_row, bias_row, inputs, size, limit, alpha, up_offset,
             GATED: tl.constexpr, BIAS: tl.constexpr, NAME: tl.constexpr, LIMITED: tl.constexpr):  # fmt: skip
    """Return f of some float32 elements of a first product, 0 behind `size`."""
    inside = inputs < size
    gate = tl.load(gate_row + inputs, mask=inside, other=0.0).to(tl.float32)
    if BIAS:
        gate += tl.load(bias_row + inputs, mask=inside, other=0.0).to(tl.float32)
    if GATED:
        up = tl.load(up_row + inputs, mask=inside, other=0.0).to(tl.float32)
        if BIAS:
            up += tl.load(bias_row + size + inputs, mask=inside, other=0.0).to(tl.float32)
        if LIMITED:
            gate = tl.minimum(gate, limit)
            up = tl.minimum(tl.maximum(up, -limit), limit)
        h = _named(gate, alpha, NAME) * (up + up_offset)
    else:
        h = _named(gate, alpha, NAME)
    return tl.where(inside, h, 0.0)


@triton.jit
def activate(
    product_ptr, bias_ptr, known_ptr, local_ptr, places_ptr, ends_ptr, codes_ptr, scales_ptr,
    experts, size, width, stride, projections, limit, alpha, up_offset,
    GATED: tl.constexpr, APART: tl.constexpr, BIAS: tl.constexpr, STATIC: tl.constexpr,
    NAME: tl.constexpr, LIMITED: tl.constexpr,
    TOP: tl.constexpr, LEAST: tl.constexpr, PIECES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """
    Apply f to a choice's row of the first product, whose up lies `width` behind its gate or, `APART`, in a row of its
    own, and quantize the result: codes `[M * T, width]`, 0 behind `size`, and scales.
    """
    choice = tl.program_id(0)
    expert = tl.load(local_ptr + choice)
    if expert >= experts:
        return
    place = tl.load(places_ptr + choice).to(tl.int64)
    gate_row = product_ptr + place * stride
    up_row = gate_row + width
    if APART:
        up_row = gate_row + tl.load(ends_ptr + experts - 1).to(tl.int64) * stride
    bias_row = gate_row
    if BIAS:
        bias_row = bias_ptr + expert.to(tl.int64) * projections * size
    codes_row = codes_ptr + place * width
    places = tl.arange(0, BLOCK)
    if PIECES == 1:
        h = _between(gate_row, up_row, bias_row, places, size, limit, alpha, up_offset, GATED, BIAS, NAME, LIMITED)
        if STATIC:
            scale = tl.load(known_ptr + expert)
            codes = _codes(tl.div_rn(h, tl.zeros_like(h) + scale), 1.0, TOP)
        else:
            scale = _scale(tl.max(tl.abs(h), 0), TOP, LEAST)
            codes = _codes(h, _inverse(scale), TOP)
        tl.store(codes_row + places, codes.to(codes_ptr.dtype.element_ty), mask=places < width)
    else:
        inverse = 1.0
        if STATIC:
            scale = tl.load(known_ptr + expert)
        else:
            largest = tl.zeros((BLOCK,), tl.float32)
            for piece in range(PIECES):
                inputs = piece * BLOCK + places
                h = _between(
                    gate_row, up_row, bias_row, inputs, size, limit, alpha, up_offset, GATED, BIAS, NAME, LIMITED
                )
                largest = tl.maximum(largest, tl.abs(h))
            scale = _scale(tl.max(largest, 0), TOP, LEAST)
            inverse = _inverse(scale)
        for piece in range(PIECES):
            inputs = piece * BLOCK + places
            h = _between(gate_row, up_row, bias_row, inputs, size, limit, alpha, up_offset, GATED, BIAS, NAME, LIMITED)
            if STATIC:
                h = tl.div_rn(h, tl.zeros_like(h) + scale)
            codes = _codes(h, inverse, TOP)
            tl.store(codes_row + inputs, codes.to(codes_ptr.dtype.element_ty), mask=inputs < width)
    tl.store(scales_ptr + place, scale)


@triton.jit
def combine(
    outputs_ptr, weights_ptr, bias_ptr, local_ptr, places_ptr, y_ptr, experts, N, stride,
    TOP_K: tl.constexpr, BIAS: tl.constexpr, ON_INPUT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Add up what a row's experts gave, in the order in which it names them: y `[M, N]`."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < N
    total = tl.zeros((BLOCK,), tl.float32)
    for number in tl.static_range(TOP_K):
        # One choice as a vector: the interpreter knows no mask that a single number has a part in.
        choice = row * TOP_K + number + tl.arange(0, 1)
        expert = tl.load(local_ptr + choice).to(tl.int64)
        place = tl.load(places_ptr + choice).to(tl.int64)
        somebody = expert < experts
        here = inside & somebody
        value = tl.load(outputs_ptr + place * stride + columns, mask=here, other=0.0).to(tl.float32)
        if BIAS:
            value += tl.load(bias_ptr + expert * N + columns, mask=here, other=0.0).to(tl.float32)
        if not ON_INPUT:
            value *= tl.load(weights_ptr + choice, mask=somebody, other=0.0)
        total += value
    tl.store(y_ptr + row * N + columns, total.to(y_ptr.dtype.element_ty), mask=inside)
