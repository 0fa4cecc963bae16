"""
Launches of the code in `device.py`.
"""

from __future__ import annotations

from functools import cache

import torch
import triton

from quantplug.cudacalls import empty
from quantplug_cublas.device import quantize_by, quantize_groups, quantize_tokens, scale_product
from quantplug_cublas.launcher import INTERPRETED, Launcher, kind

LEAST = torch.finfo(torch.float32).tiny
WIDEST = 16384
_GROUP = 128
_GROUPS, _OUTPUTS = 8, 1024
"""Groups of x, and elements of y, of a program."""


def by_tokens(x: torch.Tensor, width: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Return codes `[M, width]` of x `[M, K]` and float32 scales `[M, 1]`."""
    rows, inputs = x.shape
    device = x.get_device()
    codes, scales = room(rows, width, held(dtype), device), room(rows, 1, torch.float32, device)
    _tokens(width, dtype)((rows, 1, 1), device, kind(x), (x, codes, scales), (inputs, width, *x.stride()))
    return as_codes(codes, dtype), scales


def by_groups(x: torch.Tensor, rows: int, width: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Return codes `[rows, width]` of x `[M, K]` and float32 scales `[rows, width / 128]`, row after row of a group."""
    device = x.get_device()
    codes = room(rows, width, held(dtype), device)
    scales = room(width // _GROUP, rows, torch.float32, device)
    grid = (rows, -(-width // (_GROUP * _GROUPS)), 1)
    _groups(dtype)(grid, device, kind(x), (x, codes, scales), (*x.shape, rows, width, *x.stride()))
    return as_codes(codes, dtype), scales.t()


def by_scale(x: torch.Tensor, scale: torch.Tensor, width: int, dtype: torch.dtype) -> torch.Tensor:
    """Return codes `[M, width]` of x `[M, K]` for one float32 scale."""
    rows, inputs = x.shape
    device = x.get_device()
    codes = room(rows, width, held(dtype), device)
    launcher, programs = _scale(width, dtype)
    kinds, numbers = (*kind(x), *kind(scale)), (inputs, width, *x.stride())
    launcher((rows, programs, 1), device, kinds, (x, codes, scale), numbers)
    return as_codes(codes, dtype)


def scaled(
    sums: torch.Tensor, x_scales: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None, outputs: int,
    dtype: torch.dtype,
) -> torch.Tensor:  # fmt: skip
    """Return y `[M, N]`: sums `[M, >= N]` times scales of x (1 or M) and of rows (1 or `>= N`), plus bias `[N]`."""
    (rows, filled), device = sums.shape, sums.get_device()
    y = room(rows, outputs, torch.float32 if INTERPRETED else dtype, device)
    kinds = (dtype, *kind(x_scales), *kind(scales), *(() if bias is None else kind(bias)))
    numbers = outputs, filled, int(x_scales.numel() > 1), int(scales.numel() > 1)
    grid = (-(-outputs // _OUTPUTS), rows, 1)
    _product(bias is not None)(grid, device, kinds, (sums, x_scales, scales, bias, y), numbers)
    return y.to(dtype) if INTERPRETED else y


def room(rows: int, columns: int, dtype: torch.dtype, device: int) -> torch.Tensor:
    """Return memory `[rows, columns]` on the current device, or on the CPU for a `device` of -1."""
    if device < 0:
        return torch.empty(rows, columns, dtype=dtype)
    return empty((rows, columns), (columns, 1), dtype)


def held(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that codes are written in."""
    return torch.float32 if INTERPRETED else dtype


def as_codes(written: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return what was written as codes; the interpreter cuts off where it converts to 8-bit floats, torch rounds."""
    return written.to(dtype) if INTERPRETED else written


@cache
def _tokens(width: int, dtype: torch.dtype) -> Launcher:
    block = min(WIDEST, max(16, triton.next_power_of_2(width)))
    return Launcher(
        quantize_tokens, max(1, min(16, block // 256)),
        TOP=torch.finfo(dtype).max, LEAST=LEAST, PIECES=triton.cdiv(width, block), BLOCK=block,
    )  # fmt: skip


@cache
def _groups(dtype: torch.dtype) -> Launcher:
    return Launcher(quantize_groups, 4, TOP=torch.finfo(dtype).max, LEAST=LEAST, GROUPS=_GROUPS, GROUP=_GROUP)


@cache
def _scale(width: int, dtype: torch.dtype) -> tuple[Launcher, int]:
    """Return the launcher, and the programs of a row."""
    block = min(1024, max(16, triton.next_power_of_2(width)))
    return Launcher(quantize_by, 4, TOP=torch.finfo(dtype).max, BLOCK=block), triton.cdiv(width, block)


@cache
def _product(bias: bool) -> Launcher:
    return Launcher(scale_product, 4, BIAS=bias, BLOCK=_OUTPUTS)
