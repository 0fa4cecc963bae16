"""
llama.cpp's q4_0 grid: blocks of 32 inputs, codes -8 … 7, one scale d per block, which may be negative.

A checkpoint that was trained for this grid holds `code * d`, rounded to its own dtype. From such a block the scale is
found again: every weight w with code c allows an interval of scales, those for which `c * d` rounds to w, and any
scale that lies in all 32 intervals gives every weight back, bit for bit. That d is not simply `w / c` of the largest
weight: it may have more bits than a rounded product shows.

A block of any other weights gets llama.cpp's own choice, the largest weight over -8, and codes rounded to nearest.
"""

from __future__ import annotations

import torch

from quantplug_compressed_tensors import q4_0_small
from quantplug_compressed_tensors.floats import greatest_factor, least_factor, rounding_interval, simplest, unit

SIZE = 32
"""Inputs of one block."""
_LOWEST, _HIGHEST = -8, 7
_MAGNITUDES = range(8, 0, -1)
"""What the code of the largest weight may be, without its sign."""
# Blocks worked on at once: the temporaries stay in a processor's cache.
_PIECE = 1 << 12
_BEST = 3
_FEW = 8
"""Weights of a block that are looked at first."""


def quantize(dense: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Put a weight on the grid; one that lies on it keeps its values exactly, the signs of zeros included.

    Where there is a choice, scales have as few significant bits as possible, so that few dtypes have to round them.

    Args:
        dense: `[N, K]`, float32, float16 or bfloat16, finite. K need not be a multiple of 32.
        dtype: wished for the scales.

    Returns:
        Codes int8 `[N, K]` and scales `[N, G]`, in float32 where `dtype` cannot hold all of them exactly.
    """
    rows, inputs = dense.shape
    blocks = torch.nn.functional.pad(dense, (0, -inputs % SIZE)).reshape(-1, SIZE)
    codes = torch.empty(blocks.shape, dtype=torch.int8)
    scales = torch.empty(len(blocks), dtype=torch.float32)
    for start in range(0, len(blocks), _PIECE):
        piece = slice(start, start + _PIECE)
        codes[piece], scales[piece] = _solve(blocks[piece], dtype)
    held = scales.to(dtype)
    kept = held if torch.equal(held.float(), scales) else scales
    return codes.view(rows, -1)[:, :inputs], kept.view(rows, -1)


def _solve(stored: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Return codes `[B, 32]` and scales `[B]`, float32, of blocks in the dtype of the checkpoint."""
    values, smallest = stored.float(), unit(stored.dtype)
    peaks = _peaks(values)
    codes, scales = _nearest(values, peaks)
    # How good a block's solution is: 1 gives the values back, 2 the signs of zeros, too, 3 with a scale in the dtype.
    merit = torch.zeros(len(values), dtype=torch.int64)

    def offer(rows: torch.Tensor, found: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
        found_codes, found_scales, fits, signs = found
        held = found_scales.to(dtype).float() == found_scales
        found_merit = fits.long() + signs.long() + (signs & held).long()
        better = found_merit > merit[rows]
        at = rows[better]
        codes[at], scales[at], merit[at] = found_codes[better], found_scales[better], found_merit[better]

    small = peaks.abs() <= q4_0_small.LARGEST * smallest
    rows = small.nonzero().squeeze(1)
    if len(rows):
        offer(rows, q4_0_small.look_up(values[rows], stored.dtype))
    quotients = values.abs().div_(peaks.abs().unsqueeze(1))
    tolerance = 2 * smallest / peaks.abs()
    for magnitude in _MAGNITUDES:
        rows = _plausible(quotients, tolerance, ~small & (merit < _BEST), magnitude)
        if len(rows):
            offer(rows, _fit(stored[rows], peaks[rows], magnitude, torch.finfo(dtype).max))
    return codes, scales


def _peaks(values: torch.Tensor) -> torch.Tensor:
    """Return `[B]`, the weight of the largest magnitude of each block; of two with either sign, the positive one."""
    lowest, highest = values.aminmax(dim=1)
    return torch.where(highest >= -lowest, highest, lowest)


def _nearest(values: torch.Tensor, peaks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return codes and scales for blocks of any values; scales have float16's bits where that has all of its own."""
    scales = peaks / _LOWEST
    short = scales.to(torch.float16)
    normal = torch.isfinite(short) & (short.abs() >= torch.finfo(torch.float16).smallest_normal)
    scales = torch.where(normal, short.float(), scales)
    divisors = torch.where(scales == 0, 1.0, scales).unsqueeze(1)
    return (values / divisors).round_().clamp_(_LOWEST, _HIGHEST), scales


def _plausible(quotients: torch.Tensor, tolerance: torch.Tensor, among: torch.Tensor, magnitude: int) -> torch.Tensor:
    """
    Return the positions of blocks that may lie on a grid where the largest weight's code has that magnitude.

    Two roundings separate a quotient from a whole number: the weight's and the largest weight's. Each is at most 2^-9
    of the weight (bfloat16's half unit in the last place) or half the smallest unit; what is allowed is twice their
    sum. A few weights rule out nearly every block that lies on no grid.

    Args:
        quotients: float32 `[B, 32]`, magnitudes over the largest of their block.
        tolerance: float32 `[B]`, two smallest units over the largest magnitude.
        among: bool `[B]`, the blocks in question.
        magnitude: what the code of the largest weight may be.
    """

    def close(part: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
        codes = part * magnitude
        limit = torch.add(allowed.unsqueeze(1) * magnitude, codes, alpha=2.0**-7)
        return (codes.sub_(codes.round()).abs_() <= limit).all(1)

    rows = (close(quotients[:, :_FEW], tolerance) & among).nonzero().squeeze(1)
    return rows[close(quotients[rows], tolerance[rows])] if len(rows) else rows


def _fit(
    stored: torch.Tensor, peaks: torch.Tensor, magnitude: int, largest: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Look for scales with which the largest weight's code has that magnitude, not above `largest` where that is possible.

    Returns:
        Codes `[B, 32]`, scales `[B]`, whether they give every value back, and whether the signs of zeros, too.
    """
    values = stored.float()
    # -8 has no positive counterpart, so that it decides the sign of the scale; else zeros do, which take that sign.
    decided = magnitude == -_LOWEST
    negative = peaks > 0 if decided else ((values == 0) & torch.signbit(values)).any(1)
    steps = torch.where(negative, -peaks.abs(), peaks.abs()).div_(magnitude)
    codes = (values / steps.unsqueeze(1)).round_().clamp_(_LOWEST, _HIGHEST)
    low, high = rounding_interval(stored)
    sizes = codes.abs()
    coded = sizes > 0
    sizes.clamp_(min=1)

    def settle(least: torch.Tensor, most: torch.Tensor, rows: torch.Tensor | slice) -> torch.Tensor:
        """Return the simplest scales that lie in all intervals of a block, where there are any."""
        most = torch.where(coded[rows], most, float("inf"))
        lowest, highest = least.amax(1), most.amin(1)
        scales = simplest(lowest, torch.where(lowest <= largest, highest.clamp(max=largest), highest))
        return torch.where(negative[rows], -scales, scales)

    # Quotients may miss the last scale allowed by a bit; only where that matters are the limits found exactly.
    scales = settle(low / sizes, high / sizes, slice(None))
    fits, signs = _gives(codes, scales, stored)
    rows = (~(fits & signs)).nonzero().squeeze(1)
    if len(rows):
        scales[rows] = settle(
            least_factor(low[rows], sizes[rows]).where(coded[rows], 0.0), greatest_factor(high[rows], sizes[rows]), rows
        )
        fits[rows], signs[rows] = _gives(codes[rows], scales[rows], stored[rows])
    return codes, scales, fits, signs


def _gives(codes: torch.Tensor, scales: torch.Tensor, stored: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return bool `[B]` twice: whether codes and scales give every value back, and whether they give every bit back."""
    products = (codes * scales.unsqueeze(1)).to(stored.dtype)
    bits = torch.int32 if stored.dtype == torch.float32 else torch.int16
    return (products == stored).all(1), (products.view(bits) == stored.view(bits)).all(1)
