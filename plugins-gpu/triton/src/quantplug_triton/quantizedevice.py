"""
The code that quantizes x on the device, in a launch of its own or within a product.

A scale is computed and applied with as many roundings as `quantplug_testkit.oracles.activation` permits. A NaN, or an
infinity where scales are computed, makes NaN of all that shares its scale: by its code, or where codes are integers, by
the scale.
"""

from __future__ import annotations

import triton
import triton.language as tl

from quantplug_triton.device import scaled


@triton.jit
def largest(x, axis: tl.constexpr):
    """Return the largest magnitude along an axis of a float32 tile; bits in their order put NaN above everything."""
    magnitude = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    return tl.max(magnitude, axis).to(tl.float32, bitcast=True)


@triton.jit
def scale_of(amax, TOP: tl.constexpr):
    """Return `amax / TOP` in float32, never below the smallest normal number; NaN stays NaN."""
    scale = amax * (1.0 / TOP)
    return tl.where(scale < 1.1754943508222875e-38, 1.1754943508222875e-38, scale)


@triton.jit
def reciprocal(scale):
    """Return `1 / scale`, rounded to the nearest."""
    return tl.div_rn(tl.zeros_like(scale) + 1.0, scale)


@triton.jit
def power_of(amax, EXPONENT: tl.constexpr):
    """
    Return uint8, the float8_e8m0fnu scale for a largest magnitude; EXPONENT is that of the largest code.

    A quarter of a binade more carries into the exponent from a significand of 1.75 on, where amax is nearer to the next
    power of two times the largest code.
    """
    exponent = ((amax.to(tl.int32, bitcast=True) + 0x200000) >> 23) - EXPONENT
    return tl.minimum(tl.maximum(exponent, 0), 254).to(tl.uint8)


@triton.jit
def divided_by_power(x, amax, power):
    """Return x divided by a float8_e8m0fnu scale; NaN where that has no scale, because amax is not finite."""
    finite = amax.to(tl.int32, bitcast=True) < 0x7F800000
    return tl.where(finite, scaled(x, (254 - power).to(tl.uint8)), float("nan"))


@triton.jit
def nearest(
    quotient, TOP: tl.constexpr, BOTTOM: tl.constexpr, FRACTION: tl.constexpr, LEAST: tl.constexpr,
    dtype: tl.constexpr, ROUND: tl.constexpr,
):  # fmt: skip
    """
    Return the codes nearest to quotients, ties to even, in a dtype that holds them; see `grids.Grid`.

    Without `ROUND` the dtype is the type of the codes, and converting rounds. With it, 1.5 times the power of two at
    which a float32 has no more bits than a code is added and subtracted.
    """
    above = tl.maximum(quotient, BOTTOM, propagate_nan=tl.PropagateNan.ALL)
    limited = tl.minimum(above, TOP, propagate_nan=tl.PropagateNan.ALL)
    if ROUND:
        power = (limited.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
        shift = tl.maximum(power, LEAST) * (1.5 * 2.0 ** (23 - FRACTION))
        limited = (limited + shift) - shift
    if dtype == tl.int8:
        # The scale tells of a NaN, and no integer is one.
        limited = tl.where(limited == limited, limited, 0.0)
    return limited.to(dtype)


@triton.jit
def quantize_tokens(
    x_ptr, codes_ptr, scales_ptr, K, width, stride_xm, stride_xk,
    TOP: tl.constexpr, BOTTOM: tl.constexpr, FRACTION: tl.constexpr, LEAST: tl.constexpr, ROUND: tl.constexpr,
    PIECES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Quantize a row of x `[M, K]` by its own scale: codes `[M, width]`, 0 behind K, and float32 scales `[M]`."""
    row = tl.program_id(0).to(tl.int64)
    x_row, codes_row = x_ptr + row * stride_xm, codes_ptr + row * width
    places = tl.arange(0, BLOCK)
    dtype: tl.constexpr = codes_ptr.dtype.element_ty
    if PIECES == 1:
        x = tl.load(x_row + places.to(tl.int64) * stride_xk, mask=places < K, other=0.0).to(tl.float32)
        scale = scale_of(largest(x, 0), TOP)
        codes = nearest(x * reciprocal(scale), TOP, BOTTOM, FRACTION, LEAST, dtype, ROUND)
        tl.store(codes_row + places, codes, mask=places < width)
    else:
        scale = scale_of(row_magnitude(x_row, K, stride_xk, BLOCK), TOP)
        inverse = reciprocal(scale)
        for piece in range(PIECES):
            inputs = piece * BLOCK + places
            x = tl.load(x_row + inputs.to(tl.int64) * stride_xk, mask=inputs < K, other=0.0).to(tl.float32)
            codes = nearest(x * inverse, TOP, BOTTOM, FRACTION, LEAST, dtype, ROUND)
            tl.store(codes_row + inputs, codes, mask=inputs < width)
    tl.store(scales_ptr + row, scale)


@triton.jit
def row_magnitude(x_row, K, stride_xk, BLOCK: tl.constexpr):
    """Return the largest magnitude of K inputs."""
    most = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, K, BLOCK):
        inputs = start + tl.arange(0, BLOCK)
        x = tl.load(x_row + inputs.to(tl.int64) * stride_xk, mask=inputs < K, other=0.0).to(tl.float32)
        most = tl.maximum(most, x.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    return tl.max(most, 0).to(tl.float32, bitcast=True)


@triton.jit
def quantize_pieces(
    x_ptr, codes_ptr, scales_ptr, M, K, width, stride_xm, stride_xk,
    TOP: tl.constexpr, BOTTOM: tl.constexpr, FRACTION: tl.constexpr, LEAST: tl.constexpr, ROUND: tl.constexpr,
    SHARED: tl.constexpr, EXPONENT: tl.constexpr, GROUPS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """
    Quantize some groups of a row of x `[M, K]`: codes `[M, width]`, 0 behind K.

    Scales are `[width / GROUP, M]`, written: float32 (`SHARED` "group") or float8_e8m0fnu as uint8 ("power"); or one
    that is known, and read ("tensor").
    """
    row = tl.program_id(0).to(tl.int64)
    groups = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    inputs = groups[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    places = x_ptr + row * stride_xm + inputs.to(tl.int64) * stride_xk
    x = tl.load(places, mask=inputs < K, other=0.0).to(tl.float32)
    if SHARED == "tensor":
        quotient = tl.div_rn(x, tl.zeros_like(x) + tl.load(scales_ptr))
    else:
        amax = largest(x, 1)
        if SHARED == "power":
            scale = power_of(amax, EXPONENT)
            quotient = divided_by_power(x, amax[:, None], scale[:, None])
        else:
            scale = scale_of(amax, TOP)
            quotient = x * reciprocal(scale)[:, None]
        tl.store(scales_ptr + groups.to(tl.int64) * M + row, scale, mask=groups * GROUP < width)
    codes = nearest(quotient, TOP, BOTTOM, FRACTION, LEAST, codes_ptr.dtype.element_ty, ROUND)
    tl.store(codes_ptr + row * width + inputs, codes, mask=inputs < width)
