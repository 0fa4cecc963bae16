"""
What Triton compiles around humming's two products: quantizing x, the function between them, and the sum over experts.

A choice is one of the M * T entries of the router's ids, counted row by row.
"""

from __future__ import annotations

import triton
import triton.language as tl

from quantplug_humming.routingdevice import local_of


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
def _activated(
    gate_ptrs, inside, width, limit, alpha, up_offset,
    GATED: tl.constexpr, LIMITED: tl.constexpr, NAME: tl.constexpr,
):  # fmt: skip
    """Return f in float32 of elements of a first product, up `width` behind gate; outside: f of 0."""
    gate = tl.load(gate_ptrs, mask=inside, other=0.0).to(tl.float32)
    if GATED:
        up = tl.load(gate_ptrs + width, mask=inside, other=0.0).to(tl.float32)
        if LIMITED:
            gate = tl.minimum(gate, limit)
            up = tl.minimum(tl.maximum(up, -limit), limit)
        h = _named(gate, alpha, NAME) * (up + up_offset)
    else:
        h = _named(gate, alpha, NAME)
    return h


@triton.jit
def between(
    product_ptr, ids_ptr, map_ptr, h_ptr, count, experts, mapped, width, limit, alpha, up_offset,
    MAP: tl.constexpr, GATED: tl.constexpr, LIMITED: tl.constexpr, NAME: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write `h [M * T, width]`, f of the first product `[M * T, width or 2 width]`, for choices that are anybody's."""
    choice = tl.program_id(0)
    here = local_of(ids_ptr, map_ptr, choice + tl.arange(0, 1), count, experts, mapped, MAP) < experts
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = here & (columns < width)
    row = tl.cast(choice, tl.int64) * width
    h = _activated(
        product_ptr + row * (2 if GATED else 1) + columns, inside, width, limit, alpha, up_offset, GATED, LIMITED, NAME
    )
    tl.store(h_ptr + row + columns, h.to(h_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _encoded(values, TOP: tl.constexpr, LEAST: tl.constexpr, GROUPED: tl.constexpr):
    """
    Return what float32 values `[groups, 128]` of a row are divided by a scale, within what the codes reach, and scales
    `[groups]`: each group's own, or the row's. NaN stays NaN.
    """
    largest = tl.max(tl.abs(values), 1)
    if not GROUPED:
        largest = tl.zeros_like(largest) + tl.max(largest, 0)
    scales = tl.maximum(largest * (1.0 / TOP), LEAST)
    quotients = values * tl.div_rn(tl.zeros_like(scales) + 1.0, scales)[:, None]
    quotients = tl.maximum(quotients, -TOP, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(quotients, TOP, propagate_nan=tl.PropagateNan.ALL), scales


@triton.jit
def _put(codes_ptr, scales_ptr, row, values, groups, columns, width, here,
         TOP: tl.constexpr, LEAST: tl.constexpr, GROUPED: tl.constexpr, SPREAD: tl.constexpr):  # fmt: skip
    """Write codes and scales of a row, if `here` `[1]`; `SPREAD` writes a scale for each group, whosever it is."""
    codes, scales = _encoded(values, TOP, LEAST, GROUPED)
    codes_row = codes_ptr + row * width + columns
    tl.store(codes_row, codes.to(codes_ptr.dtype.element_ty), mask=here[:, None] & (columns < width))
    if SPREAD:
        count = width // 128
        tl.store(scales_ptr + row * count + groups, scales, mask=here & (groups < count))
    else:
        tl.store(scales_ptr + row + groups, scales, mask=here & (groups == 0))


@triton.jit
def quantize(
    x_ptr, codes_ptr, scales_ptr, K, width, stride_xm, stride_xk,
    TOP: tl.constexpr, LEAST: tl.constexpr, GROUPED: tl.constexpr, SPREAD: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """Quantize a row of x `[M, K]`: codes `[M, width]`, 0 behind K, and scales `[M, 1 or width / 128]`."""
    row, groups = tl.program_id(0).to(tl.int64), tl.arange(0, GROUPS)
    columns = groups[:, None] * 128 + tl.arange(0, 128)[None, :]
    places = x_ptr + row * stride_xm + columns.to(tl.int64) * stride_xk
    x = tl.load(places, mask=columns < K, other=0.0).to(tl.float32)
    everybody = tl.arange(0, 1) == 0
    _put(codes_ptr, scales_ptr, row, x, groups, columns, width, everybody, TOP, LEAST, GROUPED, SPREAD)


@triton.jit
def between_float8(
    product_ptr, ids_ptr, map_ptr, codes_ptr, scales_ptr, count, experts, mapped, size, width, limit, alpha, up_offset,
    MAP: tl.constexpr, GATED: tl.constexpr, LIMITED: tl.constexpr, NAME: tl.constexpr,
    TOP: tl.constexpr, LEAST: tl.constexpr, GROUPED: tl.constexpr, SPREAD: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """
    Quantize f of the first product `[M * T, size or 2 size]`, for choices that are anybody's: codes `[M * T, width]`,
    0 behind `size`, and scales `[M * T, 1 or width / 128]`.
    """
    choice, groups = tl.program_id(0).to(tl.int64), tl.arange(0, GROUPS)
    columns = groups[:, None] * 128 + tl.arange(0, 128)[None, :]
    # One choice as a vector: the interpreter knows no mask of a single number.
    here = local_of(ids_ptr, map_ptr, choice + tl.arange(0, 1), count, experts, mapped, MAP) < experts
    inside = here[:, None] & (columns < size)
    gate_ptrs = product_ptr + choice * size * (2 if GATED else 1) + columns
    h = _activated(gate_ptrs, inside, size, limit, alpha, up_offset, GATED, LIMITED, NAME)
    h = tl.where(inside, h, 0.0)
    _put(codes_ptr, scales_ptr, choice, h, groups, columns, width, here, TOP, LEAST, GROUPED, SPREAD)


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
        here = local_of(ids_ptr, map_ptr, choice, count, experts, mapped, MAP) < experts
        given = product_ptr + choice.to(tl.int64) * width + columns
        value = tl.load(given, mask=inside & here, other=0.0).to(tl.float32)
        if not ON_INPUT:
            value *= tl.load(weights_ptr + choice, mask=here, other=0.0)
        total += value
    tl.store(y_ptr + tl.cast(row, tl.int64) * outputs + columns, total.to(y_ptr.dtype.element_ty), mask=inside)
