"""
What `launch.py` does, by ordinary operators of torch: where there is no Triton.
"""

from __future__ import annotations

import torch

_LEAST = torch.finfo(torch.float32).tiny
_GROUP = 128


def by_tokens(x: torch.Tensor, width: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Return codes `[M, width]` of x `[M, K]` and float32 scales `[M, 1]`."""
    exact = _filled(x, x.shape[0], width)
    scales = _scales(exact, dtype)
    return _codes(exact / scales, dtype), scales


def by_groups(x: torch.Tensor, rows: int, width: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Return codes `[rows, width]` of x `[M, K]` and float32 scales `[rows, width / 128]`, row after row of a group."""
    exact = _filled(x, rows, width).view(rows, -1, _GROUP)
    scales = _scales(exact, dtype)
    return _codes(exact / scales, dtype).view(rows, width), scales.squeeze(2).t().contiguous().t()


def by_scale(x: torch.Tensor, scale: torch.Tensor, width: int, dtype: torch.dtype) -> torch.Tensor:
    """Return codes `[M, width]` of x `[M, K]` for one float32 scale."""
    return _codes(_filled(x, x.shape[0], width) / scale, dtype)


def scaled(
    sums: torch.Tensor, x_scales: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None, outputs: int,
    dtype: torch.dtype,
) -> torch.Tensor:  # fmt: skip
    """Return y `[M, N]`: sums `[M, >= N]` times scales of x (1 or M) and of rows (1 or `>= N`), plus bias `[N]`."""
    y = (sums * scales)[:, :outputs] * x_scales
    return (y if bias is None else y + bias).to(dtype)


def _filled(x: torch.Tensor, rows: int, width: int) -> torch.Tensor:
    return torch.nn.functional.pad(x.to(torch.float32), (0, width - x.shape[1], 0, rows - x.shape[0]))


def _scales(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return (x.abs().amax(-1, keepdim=True) / torch.finfo(dtype).max).clamp(min=_LEAST)


def _codes(quotients: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    largest = torch.finfo(dtype).max
    return quotients.clamp(-largest, largest).to(dtype)
