"""
Launches of the code in `device.py`.
"""

from __future__ import annotations

import torch
import triton

from quantplug_cublas.device import quantize_by, quantize_groups, quantize_tokens, scale_product

INTERPRETED: bool = triton.knobs.runtime.interpret
"""Triton's interpreter cuts off where it converts to 8-bit floats and bfloat16; torch converts then."""

LEAST = torch.finfo(torch.float32).tiny
WIDEST = 16384
_GROUP = 128


def by_tokens(x: torch.Tensor, width: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Return codes `[M, width]` of x `[M, K]` and float32 scales `[M, 1]`."""
    rows, inputs = x.shape
    codes = torch.empty(rows, width, dtype=held(dtype), device=x.device)
    scales = torch.empty(rows, 1, dtype=torch.float32, device=x.device)
    block = min(WIDEST, max(16, triton.next_power_of_2(width)))
    quantize_tokens[(rows,)](
        x, codes, scales, inputs, width, x.stride(0), x.stride(1),
        TOP=torch.finfo(dtype).max, LEAST=LEAST, PIECES=triton.cdiv(width, block), BLOCK=block,
        num_warps=max(1, min(16, block // 256)),
    )  # fmt: skip
    return codes.to(dtype), scales


def by_groups(x: torch.Tensor, rows: int, width: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Return codes `[rows, width]` of x `[M, K]` and float32 scales `[rows, width / 128]`, row after row of a group."""
    codes = torch.empty(rows, width, dtype=held(dtype), device=x.device)
    scales = torch.empty(width // _GROUP, rows, dtype=torch.float32, device=x.device)
    per_program = 8
    quantize_groups[(rows, triton.cdiv(width, _GROUP * per_program))](
        x, codes, scales, x.shape[0], x.shape[1], rows, width, x.stride(0), x.stride(1),
        TOP=torch.finfo(dtype).max, LEAST=LEAST, GROUPS=per_program, GROUP=_GROUP, num_warps=4,
    )  # fmt: skip
    return codes.to(dtype), scales.t()


def by_scale(x: torch.Tensor, scale: torch.Tensor, width: int, dtype: torch.dtype) -> torch.Tensor:
    """Return codes `[M, width]` of x `[M, K]` for one float32 scale."""
    codes = torch.empty(x.shape[0], width, dtype=held(dtype), device=x.device)
    block = min(1024, max(16, triton.next_power_of_2(width)))
    quantize_by[(x.shape[0], triton.cdiv(width, block))](
        x, codes, scale, x.shape[1], width, x.stride(0), x.stride(1),
        TOP=torch.finfo(dtype).max, BLOCK=block, num_warps=4,
    )  # fmt: skip
    return codes.to(dtype)


def scaled(
    sums: torch.Tensor, x_scales: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None, outputs: int,
    dtype: torch.dtype,
) -> torch.Tensor:  # fmt: skip
    """Return y `[M, N]`: sums `[M, >= N]` times scales of x (1 or M) and of rows (1 or `>= N`), plus bias `[N]`."""
    y = torch.empty(sums.shape[0], outputs, dtype=torch.float32 if INTERPRETED else dtype, device=sums.device)
    scale_product[(triton.cdiv(outputs, 1024), sums.shape[0])](
        sums, x_scales, scales, bias, y, outputs, sums.shape[1], int(x_scales.numel() > 1), int(scales.numel() > 1),
        BIAS=bias is not None, BLOCK=1024, num_warps=4,
    )  # fmt: skip
    return y.to(dtype)


def held(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that codes are written in."""
    return torch.float32 if INTERPRETED else dtype
