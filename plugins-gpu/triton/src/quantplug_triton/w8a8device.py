"""
The code that multiplies a quantized x on the device.

One program computes a tile of y over a share of the chunks. A chunk lies within one group of the weight and within one
of x, so that codes are multiplied as they are, exactly, and scales multiply sums.

The tile is that of y^T: the weight is the first operand, which tensor cores want 64 rows high, and few rows of x make a
narrow tile instead of one that is mostly empty.
"""

from __future__ import annotations

import triton
import triton.language as tl

from quantplug_triton.device import decode, scaled
from quantplug_triton.quantizedevice import (
    divided_by_power,
    largest,
    nearest,
    power_of,
    reciprocal,
    row_magnitude,
    scale_of,
)


@triton.jit
def operand(octets, field, KIND: tl.constexpr, BITS: tl.constexpr, MIDDLE: tl.constexpr, dtype: tl.constexpr):
    """Return the values of one field's codes in the dtype of x's."""
    if BITS == 8 and octets.dtype == tl.uint8:
        values = decode(octets, octets, KIND, 8, MIDDLE, dtype)
    elif BITS == 8:
        values = octets
    else:
        code = (octets >> (4 * field)) & 15
        if KIND == 4 and dtype.is_fp8():
            # float4_e2m1fn as float8_e4m3fn: six more on the exponent; 0 and the one subnormal number, a half, apart.
            size = code & 7
            bits = tl.where(size > 1, (size << 2) + 48, size * 48) | ((code & 8) << 4)
            values = bits.to(tl.uint8).to(tl.float8e4nv, bitcast=True)
        elif dtype == tl.int8:
            values = code.to(tl.int8) - MIDDLE
        elif dtype.is_fp8():
            values = (code.to(tl.float32) - MIDDLE).to(dtype)
        else:
            values = decode(code, code, KIND, 4, MIDDLE, dtype)
    return values


@triton.jit
def multiply_quantized(
    x_ptr, x_scales_ptr, codes_ptr, scales_ptr, bias_ptr, y_ptr,
    M, N, K, width, chunks, chunks_per_split, groups, per_group, rows_per_scale, scale_columns,
    stride_xm, stride_xk, stride_ym, stride_split,
    KIND: tl.constexpr, BITS: tl.constexpr, MIDDLE: tl.constexpr, CHUNK: tl.constexpr, GROUPED: tl.constexpr,
    HELD: tl.constexpr, FUSED: tl.constexpr, SHARED: tl.constexpr, TOP: tl.constexpr, BOTTOM: tl.constexpr,
    FRACTION: tl.constexpr, LEAST: tl.constexpr, ROUND: tl.constexpr, EXPONENT: tl.constexpr, SPAN: tl.constexpr,
    BIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ABREAST: tl.constexpr,
):  # fmt: skip
    """
    Compute a tile of `x [M, K] @ W^T`, or one share of it (`stride_split` apart), see `w8a8prepare.py` for the tensors.

    Args other than tensors: sizes, `width` of a row of codes in bytes, `chunks` in all and per share, and how groups
    and rows share the weight's scales, of which there are several groups where it is `GROUPED`. x is codes `[M, S]` in
    the dtype `HELD`, or where `FUSED`, what is to be quantized to such. `SHARED` tells its scales: "tensor" `[1]`,
    known; "token" `[M]`, or computed by every program; "group" and "power" `[S / CHUNK, M]`, or computed per chunk.
    Programs that follow each other take `ABREAST` tiles of outputs, then the same for the next rows: what they read of
    the weight stays in the second-level cache until all rows had it.
    """
    FIELDS: tl.constexpr = 8 // BITS
    X_GROUPED: tl.constexpr = SHARED == "group" or SHARED == "power"
    # Integers are summed as integers where no scale comes between.
    WHOLE: tl.constexpr = HELD.is_int8() and not GROUPED and not X_GROUPED
    row_tiles = tl.cdiv(M, BLOCK_M)
    turn = tl.program_id(0) % (ABREAST * row_tiles)
    first_tile = tl.program_id(0) // (ABREAST * row_tiles) * ABREAST
    abreast = tl.minimum(tl.cdiv(N, BLOCK_N) - first_tile, ABREAST)
    first_row = turn // abreast * BLOCK_M
    outputs = (first_tile + turn % abreast) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = first_row + tl.arange(0, BLOCK_M)
    share = tl.program_id(1)
    places = tl.arange(0, CHUNK)
    present = rows < M
    first = share * chunks_per_split
    last = tl.minimum(first + chunks_per_split, chunks)
    # Rows of the weight beyond the last are the last once more, and not kept.
    held = tl.minimum(outputs, N - 1)
    code_ptrs = codes_ptr + held.to(tl.int64)[:, None] * width + places[None, :]
    scale_ptrs = scales_ptr + held // rows_per_scale
    x_rows = x_ptr + rows.to(tl.int64) * stride_xm

    known = tl.zeros((BLOCK_M,), tl.float32) + 1.0
    if SHARED == "tensor":
        known *= tl.load(x_scales_ptr)
    elif SHARED == "token" and FUSED:
        for row in range(first_row, tl.minimum(first_row + BLOCK_M, M)):
            amax = row_magnitude(x_ptr + tl.cast(row, tl.int64) * stride_xm, K, stride_xk, SPAN)
            known = tl.where(rows == row, scale_of(amax, TOP), known)
    elif SHARED == "token":
        known = tl.load(x_scales_ptr + rows, mask=present, other=0.0)
    inverse = known
    if FUSED and SHARED == "token":
        inverse = reciprocal(known)

    total = tl.zeros((BLOCK_N, BLOCK_M), tl.int32 if WHOLE else tl.float32)
    for chunk in range(first, last, FIELDS):
        octets = tl.load(code_ptrs + (chunk // FIELDS) * CHUNK)
        for field in tl.static_range(FIELDS):
            slots = (chunk + field) * CHUNK + places
            if FUSED:
                x = tl.load(
                    x_rows[None, :] + slots.to(tl.int64)[:, None] * stride_xk,
                    mask=present[None, :] & (slots < K)[:, None], other=0.0,
                ).to(tl.float32)  # fmt: skip
                if SHARED == "tensor":
                    quotient = tl.div_rn(x, tl.zeros_like(x) + known[None, :])
                elif SHARED == "token":
                    quotient = x * inverse[None, :]
                else:
                    amax = largest(x, 0)
                    if SHARED == "power":
                        x_scale = power_of(amax, EXPONENT)
                        quotient = divided_by_power(x, amax[None, :], x_scale[None, :])
                    else:
                        x_scale = scale_of(amax, TOP)
                        quotient = x * reciprocal(x_scale)[None, :]
                x_codes = nearest(quotient, TOP, BOTTOM, FRACTION, LEAST, HELD, ROUND)
            else:
                x_codes = tl.load(x_rows[None, :] + slots[:, None], mask=present[None, :], other=0.0)
                if X_GROUPED:
                    x_scale = tl.load(x_scales_ptr + (chunk + field) * M + rows, mask=present, other=0)
            values = operand(octets, field, KIND, BITS, MIDDLE, HELD)
            if WHOLE:
                total = tl.dot(values, x_codes, total, out_dtype=tl.int32)
            else:
                if HELD.is_int8():
                    product = tl.dot(values, x_codes, out_dtype=tl.int32).to(tl.float32)
                elif HELD.is_fp8():
                    # Tensor cores add up FP8 in a short accumulator: no more of it than one chunk. Being told so keeps
                    # the compiler from adding up in `total` itself.
                    product = tl.dot(values, x_codes, max_num_imprecise_acc=CHUNK)
                elif HELD.is_fp32():
                    product = tl.dot(values, x_codes, input_precision="ieee")
                else:
                    product = tl.dot(values, x_codes)
                if GROUPED:
                    offset = tl.minimum((chunk + field) // per_group, groups - 1) * scale_columns
                    product = scaled(product, tl.load(scale_ptrs + offset)[:, None])
                if X_GROUPED:
                    product = scaled(product, x_scale[None, :])
                total += product

    y = total.to(tl.float32)
    if not GROUPED:
        y = scaled(y, tl.load(scale_ptrs)[:, None])
    if not X_GROUPED:
        y *= known[None, :]
    if BIAS:
        y += tl.load(bias_ptr + held).to(tl.float32)[:, None]
    y_ptrs = y_ptr + share.to(tl.int64) * stride_split + rows.to(tl.int64)[None, :] * stride_ym + outputs[:, None]
    tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=(outputs < N)[:, None] & present[None, :])
