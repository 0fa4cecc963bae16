"""
From dense weights to codes on evenly spaced values: scales that span each group's range, then rounding to nearest.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from quantplug.spec import PerGroup, PerTensor

if TYPE_CHECKING:
    from quantplug.spec import Granularity

# Weights that are worked on at once: the temporaries stay in a processor's cache.
_PIECE = 1 << 18
_SIGNIFICANT = 2.0**8


def quantize(
    dense: torch.Tensor, granularity: Granularity, bits: int, dtype: torch.dtype, *, symmetric: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """
    Take the nearest code for every weight.

    Symmetric scales are twice the largest magnitude over the number of steps, asymmetric ones the range, 0 included;
    both are rounded to eight significant bits before codes are chosen. A group of zeros has the scale 1.

    Args:
        dense: `[N, K]`, any float dtype, finite.
        granularity: which weights share a scale; groups count from the first input, the last one may be short.
        bits: width of one code.
        dtype: of the scales.
        symmetric: whether codes are signed and have no zero points.

    Returns:
        Codes `[N, K]` (int8, or uint8 with zero points), scales `[N, G]` or `[1, 1]`, and zero points uint8 or None.
    """
    outputs, inputs = dense.shape
    if isinstance(granularity, PerTensor):
        groups = dense.reshape(1, 1, -1)
    else:
        size = granularity.size if isinstance(granularity, PerGroup) else max(1, inputs)
        groups = torch.nn.functional.pad(dense, (0, -inputs % size)).unflatten(1, (-1, size))
    rows, count, size = groups.shape
    codes = torch.empty(rows, count, size, dtype=torch.int8 if symmetric else torch.uint8)
    scales = torch.empty(rows, count, dtype=dtype)
    zeros = None if symmetric else torch.empty(rows, count, dtype=torch.uint8)
    step = max(1, _PIECE // max(1, count * size))
    for start in range(0, rows, step):
        piece = slice(start, start + step)
        found = _round(groups[piece].float(), bits, dtype, symmetric=symmetric)
        codes[piece], scales[piece] = found[0], found[1]
        if zeros is not None:
            zeros[piece] = found[2]
    return codes.reshape(outputs, -1)[:, :inputs], scales, zeros


def _round(
    groups: torch.Tensor, bits: int, dtype: torch.dtype, *, symmetric: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return codes, scales and zero points, all float32, for groups float32 `[R, G, S]`."""
    top = (1 << bits) - 1
    lowest, highest = (-(top + 1) // 2, top // 2) if symmetric else (0, top)
    if symmetric:
        span = groups.abs().amax(2) * 2
        scales = _representable(span / top, dtype)
        zeros = torch.zeros_like(scales)
    else:
        low = groups.amin(2).clamp(max=0)
        span = groups.amax(2).clamp(min=0) - low
        scales = _representable(span / top, dtype)
        zeros = (-low / scales).round_().clamp_(0, top)
    codes = (groups / scales.unsqueeze(2)).round_().add_(zeros.unsqueeze(2)).clamp_(lowest, highest)
    return codes, scales, zeros


def _representable(scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return scales float32 rounded to eight significant bits and to `dtype`; 1 where nothing is left."""
    mantissa, exponent = torch.frexp(scales)
    rounded = torch.ldexp((mantissa * _SIGNIFICANT).round_() / _SIGNIFICANT, exponent)
    limits = torch.finfo(dtype)
    held = rounded.clamp(limits.smallest_normal, limits.max).to(dtype).float()
    return torch.where(scales > 0, held, 1.0)
