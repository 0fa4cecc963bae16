"""
Which cut suits a product. The rules come from sweeps on one H100: see the README.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantplug_marlin.cut import Cut, GroupCut

if TYPE_CHECKING:
    from collections.abc import Iterable

    from quantplug_marlin.device import Target
    from quantplug_marlin.form import Form

_MOST_TILES = 7
"""Of 16 outputs per warp: what registers hold."""
_LONG = 128
"""Chunks of 64 inputs from which on a block has enough to do with a share of them."""
_TALL = 0.94
"""How long 256 outputs take in one block, as a part of what twice 128 take: x is read half as often."""


def choose(form: Form, tiles: int, chunks: int, rows: int, target: Target) -> Cut | GroupCut:
    """Return a cut for a weight of so many tiles of 16 outputs and chunks of 64 inputs, and rows of x."""
    if rows <= 16:
        return _first_that_fits(_few_rows(form, tiles, chunks, 8 if rows <= 8 else 16, target), form, target)
    if rows <= 32 and target.clusters:
        return _first_that_fits(_some_rows(tiles, chunks, target), form, target)
    if target.warpgroups:
        return _warpgroups(form, tiles, chunks, 64 if rows <= 64 else 128, rows, target)
    return _many_rows(form, tiles, chunks, 32 if rows <= 32 else 64, rows, target)


def every_choice(form: Form, tiles: int, chunks: int, target: Target) -> set[Cut | GroupCut]:
    """Return all cuts that `choose` may name for a weight, whatever the number of rows."""
    rows = (1, 16, 32, 64, *range(128, 64 * 128 + 1, 128))
    found = {choose(form, tiles, chunks, number, target) for number in rows}
    if target.warpgroups:
        found |= {_group_cut(form, bands, 128, chunks, 1, target) for bands in (1, 2)}
    return found


def _first_that_fits(cuts: Iterable[Cut], form: Form, target: Target) -> Cut:
    return next(cut for cut in cuts if cut.shared_bytes(form) <= target.shared_bytes)


def _few_rows(form: Form, tiles: int, chunks: int, tokens: int, target: Target) -> Iterable[Cut]:
    """
    Yield cuts for few rows, where reading weights is what takes time, the best first.

    All blocks run at once, spread over multiprocessors as evenly as tiles allow. Where they leave half of the shared
    memory free, blocks of the next kernel begin to load while the last of this one finish.
    """
    per_processor = -(-tiles // target.processors)
    blocks = min(2, -(-per_processor // _MOST_TILES))  # several waves, where that is not enough
    wide = min(_MOST_TILES, -(-per_processor // blocks))
    if form.bits == 8:
        depths = (6, 4, 3) if per_processor <= 2 and tokens == 8 else (4, 3)
        yield from (Cut(1, tokens, 2, min(8, chunks), depth) for depth in depths)
    elif blocks == 2:
        yield from (Cut(wide, tokens, 1, min(4, chunks), depth) for depth in (4, 3))
    else:
        few, long = wide <= 2, chunks > _LONG
        ways: tuple[tuple[int, int], ...]
        if tokens == 8:
            ways = ((8, 6), (16, 4)) if few and not long else ((16, 4), (8, 4)) if few else ((16, 3), (8, 4))
        else:
            ways = ((16, 3), (8, 4)) if few and not long else ((8, 6), (8, 4)) if few else ((8, 4),)
        yield from (Cut(wide, tokens, 1, min(warps, chunks), depth) for warps, depth in ways)
    yield from (Cut(wide, tokens, 1, min(4, chunks), depth) for wide in (2, 1) for depth in (4, 3, 2))


def _some_rows(tiles: int, chunks: int, target: Target) -> Iterable[Cut]:
    """Yield cuts for up to 32 rows, the best first: warps side by side share x."""
    per_processor, warps = -(-tiles // target.processors), min(8, chunks)
    if per_processor <= 2:
        if chunks > _LONG:
            yield Cut(2, 32, 2, warps, 3, shares=2)
        yield Cut(2, 32, 1, warps, 4)
    elif per_processor <= 4:
        yield Cut(2, 32, 2, warps, 3)
    yield Cut(4, 32, 2, min(2, chunks), 4)
    yield Cut(2, 32, 2, min(2, chunks), 3)
    yield Cut(1, 32, 2, min(2, chunks), 2)


def _warpgroups(form: Form, tiles: int, chunks: int, tokens: int, rows: int, target: Target) -> GroupCut:
    """Return a cut for wgmma: all blocks at once, in clusters of two or four that share chunks where there are few."""
    bands, processors = -(-tiles // 4) * -(-rows // tokens), target.processors
    if 2 * bands <= processors:
        shares = 4 if 4 * bands <= processors and chunks >= 16 else 2 if chunks >= 8 else 1
        return _group_cut(form, 1, tokens, chunks, shares, target, groups=1)
    if bands <= processors and chunks >= 8:
        return _group_cut(form, 1, tokens, chunks, 2, target)
    waves = [-(-bands // (2 * height * processors)) * height for height in (1, 2)]
    return _group_cut(form, 1 if waves[0] < _TALL * waves[1] else 2, tokens, chunks, 1, target)


def _group_cut(
    form: Form, bands: int, tokens: int, chunks: int, shares: int, target: Target, groups: int = 2
) -> GroupCut:
    """Return a cut with as many stages as help: four, or three of long ones."""
    depth = 4 if tokens <= 64 or groups * bands == 1 else 3
    cut = GroupCut(groups, bands, tokens, 2 if chunks % 2 == 0 else 1, depth, shares)
    while cut.depth > 2 and cut.shared_bytes(form) + 1024 > target.shared_bytes:
        cut = cut._replace(depth=cut.depth - 1)
    return cut


def _many_rows(form: Form, tiles: int, chunks: int, tokens: int, rows: int, target: Target) -> Cut:
    """Return a cut for devices without wgmma: four warps side by side share x, and blocks share the chunks."""
    cuts = (Cut(wide, tokens, 4, min(2, chunks), depth) for wide, depth in ((2, 4), (1, 4), (1, 3), (1, 2)))
    cut = _first_that_fits(cuts, form, target)
    across, down, _ = cut.grid(tiles, rows)
    splits = max(1, min(8, target.processors // (across * down), chunks // 8))
    return cut._replace(splits=splits)


def choose_experts(form: Form, tiles: int, chunks: int, rows: int, blocks: int, target: Target) -> Cut:
    """Return a cut for blocks of 8, 16, 32 or 64 rows of one expert each, whose weight has so many tiles and chunks."""
    wide = 4 if rows <= 16 and form.bits == 4 and tiles * blocks >= 16 * target.processors else 2
    across = 1 if rows <= 16 else 2 if rows <= 32 else 4
    warps = min(chunks, 8 if rows <= 16 and chunks >= 16 else 4 if rows <= 32 else 2)
    cuts = (Cut(tiles_, rows, across, warps_, depth) for tiles_, warps_, depth in (
        (wide, warps, 4), (2, warps, 4), (2, warps, 3), (2, 1, 3), (2, 1, 2)))  # fmt: skip
    return _first_that_fits(cuts, form, target)
