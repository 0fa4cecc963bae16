"""
The code that runs on the device: x is quantized in one launch, and a product's scales and bias are applied in another.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _codes(x, inverse, TOP: tl.constexpr):
    """Return x times `inverse`, limited to what the codes reach; NaN stays NaN."""
    quotient = x * inverse
    above = tl.maximum(quotient, -TOP, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(above, TOP, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _scale(amax, TOP: tl.constexpr, LEAST: tl.constexpr):
    """Return `amax / TOP`, never below `LEAST`, the smallest normal number."""
    return tl.maximum(amax * (1.0 / TOP), LEAST)


@triton.jit
def _inverse(scale):
    """Return `1 / scale`, rounded to the nearest."""
    return tl.div_rn(tl.zeros_like(scale) + 1.0, scale)


@triton.jit
def quantize_tokens(
    x_ptr, codes_ptr, scales_ptr, K, width, stride_xm, stride_xk,
    TOP: tl.constexpr, LEAST: tl.constexpr, PIECES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Quantize a row of x `[M, K]` by its own scale: codes `[M, width]`, 0 behind K, and scales `[M]`."""
    row = tl.program_id(0).to(tl.int64)
    x_row, codes_row = x_ptr + row * stride_xm, codes_ptr + row * width
    places = tl.arange(0, BLOCK)
    if PIECES == 1:
        x = tl.load(x_row + places.to(tl.int64) * stride_xk, mask=places < K, other=0.0).to(tl.float32)
        scale = _scale(tl.max(tl.abs(x), 0), TOP, LEAST)
        codes = _codes(x, _inverse(scale), TOP)
        tl.store(codes_row + places, codes.to(codes_ptr.dtype.element_ty), mask=places < width)
    else:
        largest = tl.zeros((BLOCK,), tl.float32)
        for piece in range(PIECES):
            inputs = piece * BLOCK + places
            x = tl.load(x_row + inputs.to(tl.int64) * stride_xk, mask=inputs < K, other=0.0)
            largest = tl.maximum(largest, tl.abs(x.to(tl.float32)))
        scale = _scale(tl.max(largest, 0), TOP, LEAST)
        inverse = _inverse(scale)
        for piece in range(PIECES):
            inputs = piece * BLOCK + places
            x = tl.load(x_row + inputs.to(tl.int64) * stride_xk, mask=inputs < K, other=0.0).to(tl.float32)
            codes = _codes(x, inverse, TOP)
            tl.store(codes_row + inputs, codes.to(codes_ptr.dtype.element_ty), mask=inputs < width)
    tl.store(scales_ptr + row, scale)


@triton.jit
def quantize_groups(
    x_ptr, codes_ptr, scales_ptr, M, K, rows, width, stride_xm, stride_xk,
    TOP: tl.constexpr, LEAST: tl.constexpr, GROUPS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """
    Quantize some groups of a row of x `[M, K]`: codes `[rows, width]`, 0 beyond x, and scales `[width / GROUP, rows]`.
    """
    row = tl.program_id(0).to(tl.int64)
    groups = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    inputs = groups[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    there = tl.where(row < M, K, 0)
    places = x_ptr + row * stride_xm + inputs.to(tl.int64) * stride_xk
    x = tl.load(places, mask=inputs < there, other=0.0).to(tl.float32)
    scale = _scale(tl.max(tl.abs(x), 1), TOP, LEAST)
    codes = _codes(x, _inverse(scale)[:, None], TOP)
    tl.store(codes_ptr + row * width + inputs, codes.to(codes_ptr.dtype.element_ty), mask=inputs < width)
    tl.store(scales_ptr + groups * rows + row, scale, mask=groups * GROUP < width)


@triton.jit
def quantize_by(
    x_ptr, codes_ptr, scale_ptr, K, width, stride_xm, stride_xk, TOP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Quantize x `[M, K]` by one scale that is known: codes `[M, width]`, 0 behind K."""
    row = tl.program_id(0).to(tl.int64)
    inputs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * stride_xm + inputs.to(tl.int64) * stride_xk, mask=inputs < K, other=0.0).to(tl.float32)
    quotient = tl.div_rn(x, tl.zeros_like(x) + tl.load(scale_ptr))
    codes = _codes(quotient, 1.0, TOP)
    tl.store(codes_ptr + row * width + inputs, codes.to(codes_ptr.dtype.element_ty), mask=inputs < width)


@triton.jit
def scale_product(
    sums_ptr, x_scales_ptr, scales_ptr, bias_ptr, y_ptr, N, width, x_step, step,
    BIAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Multiply sums `[M, width]` by scales of x and of rows, `x_step` and `step` apart, and add a bias: y `[M, N]`."""
    row = tl.program_id(1).to(tl.int64)
    outputs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = outputs < N
    y = tl.load(sums_ptr + row * width + outputs, mask=inside, other=0.0)
    y = y * tl.load(scales_ptr + outputs * step, mask=inside, other=0.0) * tl.load(x_scales_ptr + row * x_step)
    if BIAS:
        y += tl.load(bias_ptr + outputs, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * N + outputs, y.to(y_ptr.dtype.element_ty), mask=inside)
