"""
The code that runs on the device: x is quantized in one launch.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def quantize_groups(
    x_ptr, codes_ptr, scales_ptr, K, width, step, stride_xm, stride_xk,
    TOP: tl.constexpr, LEAST: tl.constexpr, GROUPS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """
    Quantize some groups of a row of x `[M, K]`: codes `[M, width]`, 0 behind K, and scales `[width / GROUP, step]`,
    those of the same group together, M of `step`.
    """
    row = tl.program_id(0).to(tl.int64)
    groups = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    inputs = groups[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    places = x_ptr + row * stride_xm + inputs.to(tl.int64) * stride_xk
    x = tl.load(places, mask=inputs < K, other=0.0).to(tl.float32)
    scales = tl.maximum(tl.max(tl.abs(x), 1) * (1.0 / TOP), LEAST)
    quotients = x * tl.div_rn(tl.full((GROUPS,), 1.0, tl.float32), scales)[:, None]
    # A NaN stays one.
    above = tl.maximum(quotients, -TOP, propagate_nan=tl.PropagateNan.ALL)
    codes = tl.minimum(above, TOP, propagate_nan=tl.PropagateNan.ALL)
    tl.store(codes_ptr + row * width + inputs, codes.to(codes_ptr.dtype.element_ty), mask=inputs < width)
    tl.store(scales_ptr + groups.to(tl.int64) * step + row, scales, mask=groups * GROUP < width)
