"""
From dense weights to codes: scales that span each tile's range, then rounding to nearest.

Scales are chosen as float32 and rounded to bfloat16 before any code is, so that codes belong to the scale that is
stored.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from quantplug.spec import PerBlock, PerChannel, PerGroup, PerTensor

if TYPE_CHECKING:
    from quantplug.spec import Granularity

SCALE_DTYPE = torch.bfloat16
_PIECE = 1 << 20
"""Elements that are rounded at once: their float32 copies stay in a processor's cache."""


class Rounded(NamedTuple):
    """
    A quantized weight: `value = (code - zero) * scale`.

    Attributes:
        codes: `[N, K]`, int8, or uint8 where there are zero points.
        scales: bfloat16, in the shape of the granularity.
        zeros: uint8 in the same shape, or None.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None


def round_to_nearest(dense: torch.Tensor, granularity: Granularity, bits: int, *, symmetric: bool) -> Rounded:
    """
    Take the nearest code for every weight, on scales that span the range of their tile.

    A symmetric range is cut into 2^bits - 1 steps like any other, so that its positive end lies half a step beyond the
    largest code.

    Args:
        dense: `[N, K]`, any float dtype, finite.
        granularity: which weights share a scale.
        bits: width of a code.
        symmetric: whether codes are signed and have no zero points.
    """
    n, k = _tile(granularity, *dense.shape)
    low, high = _ranges(dense, n, k)
    steps = (1 << bits) - 1
    # Divided before they are added: the range of numbers near the end of float32 would be infinite.
    step = torch.maximum(-low, high) / (steps / 2) if symmetric else high / steps - low / steps
    # The smallest normal number stands for an empty range: its codes are all 0, and 0 they mean.
    scales = step.to(SCALE_DTYPE).clamp(min=torch.finfo(SCALE_DTYPE).tiny)
    zeros = torch.zeros_like(low) if symmetric else (-low / scales.float()).round_().clamp_(0, steps)
    bottom = -(1 << (bits - 1)) if symmetric else 0
    codes = torch.empty(dense.shape, dtype=torch.int8 if symmetric else torch.uint8)
    rows = max(1, _PIECE // max(1, dense.shape[1]))
    for start in range(0, len(dense), rows):
        piece = slice(start, min(start + rows, len(dense)))
        scale, zero = (_spread(values, piece, n, k, dense.shape[1]) for values in (scales.float(), zeros))
        codes[piece] = (dense[piece].float() / scale).round_().add_(zero).clamp_(bottom, bottom + steps)
    return Rounded(codes, scales, None if symmetric else zeros.to(torch.uint8))


def _tile(granularity: Granularity, rows: int, inputs: int) -> tuple[int, int]:
    """Return rows and inputs that share a scale, neither 0."""
    match granularity:
        case PerTensor():
            return max(1, rows), max(1, inputs)
        case PerChannel():
            return 1, max(1, inputs)
        case PerGroup(size=size):
            return 1, size
        case PerBlock(n=n, k=k):
            return n, k


def _ranges(dense: torch.Tensor, n: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the smallest and the largest value of each tile, 0 included, float32 `[ceil(N / n), ceil(K / k)]`."""
    rows, inputs = dense.shape
    below, beside = -rows % n, -inputs % k
    padded = torch.nn.functional.pad(dense, (0, beside, 0, below)) if below or beside else dense
    tiles = padded.reshape((rows + below) // n, n, (inputs + beside) // k, k)
    return tiles.amin((1, 3)).float().clamp(max=0), tiles.amax((1, 3)).float().clamp(min=0)


def _spread(values: torch.Tensor, rows: slice, n: int, k: int, inputs: int) -> torch.Tensor:
    """Return what belongs to each element of some rows, `[rows, K]` or broadcastable to it."""
    mine = values[torch.arange(rows.start, rows.stop) // n]
    return mine if mine.shape[1] == 1 else mine.repeat_interleave(k, 1)[:, :inputs]
