"""
The code that runs on the device.

One program computes a tile of y `[BLOCK_M, BLOCK_N]` over a share of the chunks. Codes are multiplied as they are,
exactly, and each chunk's product is multiplied by its scales; so nothing is rounded but the float32 sums.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def decode(field, zero, KIND: tl.constexpr, BITS: tl.constexpr, MIDDLE: tl.constexpr, dtype: tl.constexpr):
    """
    Return the values of codes in `dtype`, without their scale.

    Eight significant bits hold every difference of codes, and every floating-point code. Those are put together as
    float16 with the exponent as it stands, and multiplied by the difference of the two biases; a float16 has its
    subnormal numbers on every device.
    """
    if KIND <= 1:
        # A code in the low bits of a power of two is their sum: one subtraction, and no conversion.
        if dtype == tl.bfloat16 and BITS <= 4:
            lifted = (field.to(tl.int16) | 0x4300).to(tl.bfloat16, bitcast=True)
            return lifted - (zero.to(tl.bfloat16) + 128.0 if KIND == 0 else 128.0 + MIDDLE)
        if dtype == tl.float16:
            lifted = (field.to(tl.int16) | 0x6400).to(tl.float16, bitcast=True)
            return lifted - (zero.to(tl.float16) + 1024.0 if KIND == 0 else 1024.0 + MIDDLE)
        return (field.to(tl.float32) - (zero.to(tl.float32) if KIND == 0 else MIDDLE)).to(dtype)
    bits = field.to(tl.int32)
    if KIND == 2:  # float8_e4m3fn: four exponent bits with bias 7
        half = ((bits & 0x80) << 8) | ((bits & 0x7F) << 7)
        factor = 256.0
    elif KIND == 3:  # float8_e5m2: the upper half of a float16
        half = bits << 8
        factor = 1.0
    else:  # float4_e2m1fn: two exponent bits with bias 1
        half = ((bits & 0x8) << 12) | ((bits & 0x7) << 9)
        factor = 16384.0
    value = half.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return (value * factor).to(dtype)


@triton.jit
def scaled(product, scale):
    """Return a product times scales that are spread over it."""
    if scale.dtype == tl.uint8:
        # float8_e8m0fnu reaches below float32's normal numbers, which a device may flush: two powers of two.
        exponent = scale.to(tl.int32)
        lower = ((exponent >> 1) + 64) << 23
        upper = (exponent - (exponent >> 1) + 63) << 23
        return product * lower.to(tl.float32, bitcast=True) * upper.to(tl.float32, bitcast=True)
    return product * scale.to(tl.float32)


@triton.jit
def sums(
    x_rows, present, stride_xk, K, codes_ptr, scales_ptr, zeros_ptr, columns_ptr, outputs, N, chunks, first, last,
    groups, per_group, rows_per_scale, scale_columns,
    KIND: tl.constexpr, BITS: tl.constexpr, MIDDLE: tl.constexpr, CHUNK: tl.constexpr, COLUMNS: tl.constexpr,
    EXACT: tl.constexpr, ONE_GROUP: tl.constexpr, TURNS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    TILE_ROWS: tl.constexpr,
):  # fmt: skip
    """
    Return a tile of `x [M, K] @ W^T` in float32, over the chunks from `first` to `last`, see `prepare.py`.

    Args other than tensors and their sizes: pointers to the rows of x `[BLOCK_M]` and whether each is there; the
    outputs of the tile `[BLOCK_N]`; how groups and rows share scales. With `EXACT` tiles are multiplied in float32.
    Where rows of several projections take `TURNS`, so do their scales.
    """
    FIELDS: tl.constexpr = 8 // BITS
    places = tl.arange(0, CHUNK)
    dtype: tl.constexpr = tl.float32 if EXACT else x_rows.dtype.element_ty

    # 64 rows of the weight lie side by side; below them the bytes of all slots follow each other.
    # A tile of two such blocks may find one: the last is read once more, and not kept.
    byte_rows = (chunks // FIELDS) * CHUNK
    column_blocks = tl.minimum(outputs // TILE_ROWS, (N - 1) // TILE_ROWS)
    tile = column_blocks.to(tl.int64) * byte_rows * TILE_ROWS + outputs % TILE_ROWS
    code_ptrs = codes_ptr + tile[None, :] + places[:, None] * TILE_ROWS
    shared = outputs // rows_per_scale if TURNS == 1 else outputs // TURNS // rows_per_scale * TURNS + outputs % TURNS
    scale_ptrs = scales_ptr + shared
    zero_ptrs = scale_ptrs
    if KIND == 0:
        zero_ptrs = zeros_ptr + shared
    inside = outputs < N

    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for chunk in range(first, last, FIELDS):
        octets = tl.load(code_ptrs + (chunk // FIELDS) * CHUNK * TILE_ROWS)
        # Chunks that only fill the last byte up belong to no group; their x is 0.
        offset = tl.minimum(chunk // per_group, groups - 1) * scale_columns
        scale = tl.load(scale_ptrs + offset, mask=inside, other=0)
        zero = scale
        if KIND == 0:
            zero = tl.load(zero_ptrs + offset, mask=inside, other=0)
        product = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for field in tl.static_range(FIELDS):
            if field > 0 and not ONE_GROUP:
                offset = tl.minimum((chunk + field) // per_group, groups - 1) * scale_columns
                scale = tl.load(scale_ptrs + offset, mask=inside, other=0)
                if KIND == 0:
                    zero = tl.load(zero_ptrs + offset, mask=inside, other=0)
            slots = (chunk + field) * CHUNK + places
            if COLUMNS:
                inputs = tl.load(columns_ptr + slots)
                taken = inputs >= 0
            else:
                inputs = slots
                taken = slots < K
            x = tl.load(
                x_rows[:, None] + inputs.to(tl.int64)[None, :] * stride_xk,
                mask=present[:, None] & taken[None, :], other=0.0,
            )  # fmt: skip
            code = (octets >> (BITS * field)) & ((1 << BITS) - 1)
            values = decode(code, zero[None, :], KIND, BITS, MIDDLE, dtype)
            if EXACT:
                product = tl.dot(x.to(tl.float32), values, product, input_precision="ieee")
            else:
                product = tl.dot(x, values, product)
            if field == FIELDS - 1 or not ONE_GROUP:
                total += scaled(product, scale[None, :])
                product = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    return total


@triton.jit
def multiply(
    x_ptr, codes_ptr, scales_ptr, zeros_ptr, columns_ptr, factor_ptr, bias_ptr, y_ptr,
    M, N, K, chunks, chunks_per_split, groups, per_group, rows_per_scale, scale_columns,
    stride_xm, stride_xk, stride_ym, stride_split,
    KIND: tl.constexpr, BITS: tl.constexpr, MIDDLE: tl.constexpr, CHUNK: tl.constexpr,
    COLUMNS: tl.constexpr, FACTOR: tl.constexpr, BIAS: tl.constexpr, EXACT: tl.constexpr, ONE_GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TILE_ROWS: tl.constexpr,
):  # fmt: skip
    """
    Compute a tile of `x [M, K] @ W^T`, or one share of it (`stride_split` apart), see `prepare.py` for the tensors.

    Args other than tensors: sizes, `chunks` in all and per share, and how groups and rows share scales, see `sums`.
    """
    rows = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    outputs = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    share = tl.program_id(2)
    inside = outputs < N
    first = share * chunks_per_split
    last = tl.minimum(first + chunks_per_split, chunks)
    total = sums(
        x_ptr + rows.to(tl.int64) * stride_xm, rows < M, stride_xk, K, codes_ptr, scales_ptr, zeros_ptr, columns_ptr,
        outputs, N, chunks, first, last, groups, per_group, rows_per_scale, scale_columns,
        KIND, BITS, MIDDLE, CHUNK, COLUMNS, EXACT, ONE_GROUP, 1, BLOCK_M, BLOCK_N, TILE_ROWS,
    )  # fmt: skip

    keep = (rows < M)[:, None] & inside[None, :]
    y_ptrs = y_ptr + share.to(tl.int64) * stride_split + rows.to(tl.int64)[:, None] * stride_ym + outputs[None, :]
    if FACTOR:
        total *= tl.load(factor_ptr)
    if BIAS:
        total += tl.load(bias_ptr + outputs, mask=inside, other=0.0).to(tl.float32)[None, :]
    tl.store(y_ptrs, total.to(y_ptr.dtype.element_ty), mask=keep)


@triton.jit
def add_shares(
    shares_ptr, factor_ptr, bias_ptr, y_ptr, M, N, stride_ym, stride_split, SHARES: tl.constexpr,
    FACTOR: tl.constexpr, BIAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Add up the shares of y `[SHARES, M, N]`, always in the same order, and finish y `[M, N]`."""
    row = tl.program_id(1).to(tl.int64)
    outputs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = outputs < N
    total = tl.zeros((BLOCK,), tl.float32)
    for share in tl.static_range(SHARES):
        total += tl.load(shares_ptr + share * stride_split + row * N + outputs, mask=inside, other=0.0)
    if FACTOR:
        total *= tl.load(factor_ptr)
    if BIAS:
        total += tl.load(bias_ptr + outputs, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * stride_ym + outputs, total.to(y_ptr.dtype.element_ty), mask=inside)
