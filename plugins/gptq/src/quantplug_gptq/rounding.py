"""
From dense weights to codes without a Hessian: scales and zero points by search, then rounding to nearest.

Inside, weights are kept transposed, `[K, N]` and `[G, N]`: one input column is then one contiguous vector, and all
output rows are worked on at once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

# Parts of a group's full range that are tried as its clipping range.
_CLIPS = tuple(1.0 - 0.04 * step for step in range(8))
# Scales get eight significant bits, so that float16 and bfloat16 both hold them exactly.
_SCALE_STEPS = 2.0**8
_SMALLEST_SCALE = 2.0**-20
_LARGEST_SCALE = 65280.0
_TINY = 1e-30
# Elements per piece of a search: its temporaries stay in a processor's cache.
_PIECE = 1 << 18


@dataclass(frozen=True, slots=True)
class Grid:
    """
    What values a layer may take.

    Attributes:
        bits: width of one code.
        group_size: inputs per group, -1 for all.
        sym: whether every zero point is the middle one.
        smallest_zero: smallest zero point allowed. Not all readers of version 1 files agree about a 0.
    """

    bits: int
    group_size: int
    sym: bool
    smallest_zero: int

    @property
    def top(self) -> int:
        """The largest code."""
        return (1 << self.bits) - 1

    def size(self, inputs: int) -> int:
        """Return the inputs of one group."""
        return max(1, inputs) if self.group_size == -1 else self.group_size


@dataclass(frozen=True, slots=True, eq=False)
class Rounded:
    """
    A quantized layer: `value = (code - zero) * scale`.

    Attributes:
        codes: uint8 `[N, K]`.
        scales: float32 `[N, G]`, each exact in float16.
        zeros: uint8 `[N, G]`.
        g_idx: int64 `[K]`, the group of each input.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor
    g_idx: torch.Tensor

    @staticmethod
    def of(codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, g_idx: torch.Tensor) -> Rounded:
        """Build it from the transposed float tensors that the work is done on."""
        return Rounded(codes.t().to(torch.uint8), scales.t().contiguous(), zeros.t().to(torch.uint8), g_idx)


def round_to_nearest(dense: torch.Tensor, grid: Grid) -> Rounded:
    """
    Take the nearest code for every weight.

    Args:
        dense: `[N, K]`, any float dtype, finite.
        grid: what values it may take.
    """
    columns = dense.detach().float().t().contiguous()
    scales, zeros = search_parameters(columns, grid)
    g_idx = torch.arange(len(columns)) // grid.size(len(columns))
    codes = (columns / scales[g_idx]).round_().add_(zeros[g_idx]).clamp_(0, grid.top)
    return Rounded.of(codes, scales, zeros, g_idx)


def search_parameters(
    columns: torch.Tensor, grid: Grid, importance: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Choose scales and zero points, float32 `[G, N]`.

    Of some clipping ranges per group and row, the one with the smallest sum of `importance * error^2` is taken; one
    step of least squares then adapts the scale to the codes it leads to.

    Args:
        columns: float32 `[K, N]`, the transposed weight; consecutive inputs share a group.
        grid: what values it may take.
        importance: float32 `[K]`, the diagonal of a Hessian, or None when all inputs count alike.
    """
    inputs, rows = columns.shape
    size = grid.size(inputs)
    groups = -(-inputs // size)
    if importance is None:
        importance = columns.new_ones(inputs)
    missing = groups * size - inputs  # a short last group is filled up with zeros that count for nothing
    columns = torch.nn.functional.pad(columns, (0, 0, 0, missing)).view(groups, size, rows)
    importance = torch.nn.functional.pad(importance, (0, missing)).view(groups, size, 1)
    step = max(1, _PIECE // max(1, size * rows))
    parts = [
        _search(columns[start : start + step], importance[start : start + step], grid)
        for start in range(0, groups, step)
    ]
    return torch.cat([scale for scale, _ in parts]), torch.cat([zero for _, zero in parts])


def _search(columns: torch.Tensor, importance: torch.Tensor, grid: Grid) -> tuple[torch.Tensor, torch.Tensor]:
    """Return scales and zero points `[G, N]` for columns `[G, size, N]` and importance `[G, size, 1]`."""
    if grid.sym:
        span = columns.abs().amax(1) * 2
        zero = torch.full_like(span, 1 << (grid.bits - 1))
    else:
        low = columns.amin(1).clamp(max=0)
        span = columns.amax(1).clamp(min=0) - low
        zero = (-low * grid.top / span.clamp(min=_TINY)).round().clamp(grid.smallest_zero, grid.top)
    lowest, highest = -zero.unsqueeze(1), (grid.top - zero).unsqueeze(1)

    def attempt(wish: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        scale = _round_scale(wish)
        centred = torch.minimum(torch.maximum((columns / scale.unsqueeze(1)).round_(), lowest), highest)
        error = torch.addcmul(columns, centred, scale.unsqueeze(1), value=-1).square_()
        return error.mul_(importance).sum(1), scale, centred

    best_error, best, _ = attempt(span * (_CLIPS[0] / grid.top))
    for clip in _CLIPS[1:]:
        error, scale, _ = attempt(span * (clip / grid.top))
        best = torch.where(error < best_error, scale, best)
        best_error = torch.minimum(error, best_error)
    best_error, best, centred = attempt(best)
    weighted = centred * importance
    fitted = (weighted * columns).sum(1) / (weighted * centred).sum(1).clamp(min=_TINY)
    error, scale, _ = attempt(fitted)
    return torch.where(error < best_error, scale, best), zero


def _round_scale(scale: torch.Tensor) -> torch.Tensor:
    mantissa, exponent = torch.frexp(scale.clamp(_SMALLEST_SCALE, _LARGEST_SCALE))
    rounded = torch.ldexp((mantissa * _SCALE_STEPS).round_() / _SCALE_STEPS, exponent)
    # Below 2^-14 float16 has fewer significant bits left.
    return rounded.clamp(_SMALLEST_SCALE, _LARGEST_SCALE).half().float()
