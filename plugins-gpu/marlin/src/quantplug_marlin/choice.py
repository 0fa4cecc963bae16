"""
Which cut suits a product. What the rules come from is measured: see `benchmarks/gpu/README.md`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantplug_marlin.cut import Cut

if TYPE_CHECKING:
    from quantplug_marlin.device import Target
    from quantplug_marlin.form import Form

REPRESENTATIVE_ROWS = (1, 16, 32, 64, 128)
"""One number of rows of x for each choice that is made."""

_FEW_ROWS = 16
"""Up to here weights are what takes time, and each warp streams its own."""
_MOST_TILES = 7
"""Of 16 outputs per warp: what registers hold."""


def choose(form: Form, tiles: int, chunks: int, rows: int, target: Target) -> Cut:
    """Return a cut for a weight of so many tiles of 16 outputs and chunks of 64 inputs, and rows of x."""
    if rows <= _FEW_ROWS:
        return _few_rows(form, tiles, chunks, 8 if rows <= 8 else 16, target)
    if target.warpgroups:
        tokens = 32 if rows <= 32 else 64
        return Cut(1, tokens, 8, 1, 5, _shares(-(-tiles // 8), chunks, target), warpgroup=True)
    return _many_rows(form, tiles, chunks, 32 if rows <= 32 else 64, rows, target)


def _few_rows(form: Form, tiles: int, chunks: int, tokens: int, target: Target) -> Cut:
    """
    Return a cut for which all blocks run at once, as evenly spread over multiprocessors as tiles allow.

    Blocks that share a multiprocessor must fit into its shared memory together.
    """
    per_processor = -(-tiles // target.processors)
    blocks = min(2, -(-per_processor // _MOST_TILES))  # several waves, where that is not enough
    wide = min(_MOST_TILES, -(-per_processor // blocks))
    for depth in (4, 3, 2):
        for warps in (16 // blocks, 8 // blocks):
            cut = Cut(wide, tokens, 1, min(warps, chunks), depth)
            if (cut.shared_bytes(form) + 1024) * blocks <= target.shared_bytes:
                return cut
    return Cut(1, tokens, 1, min(4, chunks), 2)


def _many_rows(form: Form, tiles: int, chunks: int, tokens: int, rows: int, target: Target) -> Cut:
    """Return a cut for devices without wgmma: four warps side by side share x, and blocks share the chunks."""
    for wide, depth in ((2, 4), (1, 4), (1, 3)):
        cut = Cut(wide, tokens, 4, 2, depth)
        if cut.shared_bytes(form) <= target.shared_bytes:
            break
    across, down, _ = cut.grid(tiles, rows)
    splits = max(1, min(8, target.processors // (across * down), chunks // 8))
    return cut._replace(splits=splits)


def _shares(blocks: int, chunks: int, target: Target) -> int:
    """Return how many blocks of a cluster share the chunks: a power of two, so that two blocks a processor are busy."""
    shares = 1
    while shares < 8 and blocks * shares * 2 <= 2 * target.processors and chunks >= 8 * shares:
        shares *= 2
    return shares
