"""
The tiles of a weight that share a scale, and the choice of codes and scales: all granularities alike.

A scale belongs to a tile of `n` rows and `k` inputs: the whole weight, a row, a group of a row, or a block.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from quantplug.spec import PerBlock, PerChannel, PerGroup, PerTensor, scale_shape

if TYPE_CHECKING:
    from collections.abc import Iterator

    from quantplug.spec import Granularity

Tile = tuple[int, int]
"""Rows and inputs of one tile, at most those of the weight and at least 1."""

_CHUNK = 1 << 21
"""Elements that are worked on at a time, so that a large weight needs no second copy of itself in float32."""
_SMALLEST_SCALE = torch.finfo(torch.float32).tiny


def tile_of(granularity: Granularity, out_features: int, in_features: int) -> Tile:
    """Return the size of the tiles of an `[N, K]` weight; those at the edges may be smaller."""
    match granularity:
        case PerTensor():
            n, k = out_features, in_features
        case PerChannel():
            n, k = 1, in_features
        case PerGroup(size=k):
            n = 1
        case PerBlock(n=n, k=k):
            pass
    return max(1, min(n, out_features)), max(1, min(k, in_features))


def tile_maxima(values: torch.Tensor, tile: Tile) -> torch.Tensor:
    """
    Return the largest element of each tile, `[ceil(N / n), ceil(K / k)]`.

    Args:
        values: `[N, K]`, not negative, not empty.
        tile: size of the tiles.
    """
    (n, k), (rows, columns) = tile, values.shape
    down, across = -(-rows // n), -(-columns // k)
    whole = torch.nn.functional.pad(values, (0, across * k - columns, 0, down * n - rows))
    return whole.view(down, n, across, k).amax((1, 3))


def spread(scales: torch.Tensor, tile: Tile, rows: int, columns: int) -> torch.Tensor:
    """Return the scale of each element, in a shape that broadcasts to `[rows, columns]`."""
    n, k = tile
    by_row = scales if scales.shape[0] == 1 else scales.repeat_interleave(n, 0)[:rows]
    return by_row if scales.shape[1] == 1 else by_row.repeat_interleave(k, 1)[:, :columns]


def round_to_nearest(
    dense: torch.Tensor, granularity: Granularity, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Return codes `[N, K]`, and scales float32 in the shape of the granularity, each the least that covers its tile.

    A scale is the tile's largest magnitude over the largest code; it is 1 for a tile of zeros, and never below the
    smallest normal float32. Codes are the quotients, rounded to nearest, ties to even. None needs to be cut off: a
    quotient exceeds the largest code by float32's rounding at most, and so is rounded to it.

    Args:
        dense: `[N, K]`, any float dtype, finite.
        granularity: how scales are shared.
        dtype: one of torch's float8 dtypes.
    """
    rows, columns = dense.shape
    tile = tile_of(granularity, rows, columns)
    n, top = tile[0], torch.finfo(dtype).max
    peaks = _peaks(dense, tile, scale_shape(granularity, rows, columns))
    scales = torch.where(peaks == 0, 1.0, (peaks / top).clamp_min_(_SMALLEST_SCALE))
    codes = torch.empty(dense.shape, dtype=dtype)
    for start, stop in _strips(rows, columns, 1 if n >= rows else n):
        strip = dense[start:stop].to(torch.float32, copy=True)
        strip.div_(spread(scales[start // n : -(-stop // n)], tile, *strip.shape))
        codes[start:stop] = strip
    return codes, scales


def _peaks(dense: torch.Tensor, tile: Tile, shape: tuple[int, int]) -> torch.Tensor:
    """Return the largest magnitude of each tile, float32; 0 for tiles without elements."""
    n = tile[0]
    peaks = torch.zeros(shape)
    if not dense.numel():
        return peaks
    if peaks.numel() == 1:
        low, high = dense.aminmax()
        return torch.maximum(-low, high).float().reshape(1, 1)
    for start, stop in _strips(dense.shape[0], dense.shape[1], n):
        peaks[start // n : -(-stop // n)] = tile_maxima(dense[start:stop].float().abs(), tile)
    return peaks


def _strips(rows: int, columns: int, height: int) -> Iterator[tuple[int, int]]:
    """Yield the first row and the end of strips of whole tiles, of about `_CHUNK` elements or one tile high."""
    step = max(1, _CHUNK // max(1, columns) // height) * height
    for start in range(0, rows, step):
        yield start, min(start + step, rows)
