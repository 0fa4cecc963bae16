"""
Which cut suits a product. The rules come from sweeps on one H100: see the README.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from quantplug_marlin.cut import Cut, GroupCut

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from quantplug_marlin.device import Target
    from quantplug_marlin.form import Form

_MOST_TILES = 7
"""Of 16 outputs per warp: what registers hold."""
_LONG = 128
"""Chunks of 64 inputs from which on a block has enough to do with a share of them."""
_SHORT_ROWS = 8192
"""Rows up to which every cut may suit; beyond, those whose blocks take one piece after the other."""


_MANY_ROWS = tuple(range(64, _SHORT_ROWS + 1, 64))
"""Numbers of rows between which no other cut is chosen."""


class _Speed(NamedTuple):
    """
    How long a block of warpgroups takes for 64 inputs, in microseconds: a part per row of x and one per chunk.

    Attributes:
        alone: of one warpgroup.
        both: of two.
    """

    alone: tuple[float, float]
    both: tuple[float, float]


_SCALED = _Speed((0.0008, 0.121), (0.0022, 0.095))
_PLAIN = _Speed((0.0006, 0.150), (0.0022, 0.110))
"""Measured on one H100: where sums of groups are scaled, and where products are just added up."""
_PIECE_US, _SHARED_US = 1.5, 4.0
"""What a piece of y costs besides, and what it does where two blocks share it."""


def choose(form: Form, tiles: int, chunks: int, rows: int, target: Target) -> Cut | GroupCut:
    """Return a cut for a weight of so many tiles of 16 outputs and chunks of 64 inputs, and rows of x."""
    if rows <= 16:
        return _first_that_fits(_few_rows(form, tiles, chunks, 8 if rows <= 8 else 16, target), form, target)
    if rows <= 32 and target.clusters:
        return _first_that_fits(_some_rows(tiles, chunks, target), form, target)
    if target.warpgroups:
        return choose_warpgroups(form, tiles, chunks, rows, target)
    return _many_rows(form, tiles, chunks, 32 if rows <= 32 else 64, rows, target)


def choose_warpgroups(form: Form, tiles: int, chunks: int, rows: int, target: Target) -> GroupCut:
    """Return the cut for wgmma that suits a weight of so many tiles and chunks of 64 inputs, and rows of x."""
    cuts = _warpgroups(form, chunks, rows, target)
    return min(cuts, key=lambda cut: _time(cut, form, tiles, chunks, rows, target))


def every_choice(form: Form, tiles: int, chunks: int, target: Target) -> set[Cut | GroupCut]:
    """Return all cuts that `choose` may name for a weight, whatever the number of rows."""
    few = {choose(form, tiles, chunks, number, target) for number in (1, 16, 32)}
    if target.warpgroups:
        return few | every_warpgroups_choice(form, tiles, chunks, target)
    return few | {choose(form, tiles, chunks, number, target) for number in _MANY_ROWS}


def every_warpgroups_choice(form: Form, tiles: int, chunks: int, target: Target) -> set[GroupCut]:
    """Return all cuts that `choose_warpgroups` may name for a weight, whatever the number of rows."""
    found = {choose_warpgroups(form, tiles, chunks, number, target) for number in _MANY_ROWS}
    return found | set(_warpgroups(form, chunks, _SHORT_ROWS + 1, target))


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


def _warpgroups(form: Form, chunks: int, rows: int, target: Target) -> Iterator[GroupCut]:
    """Yield the cuts for wgmma that may suit so many rows."""
    # Codes that lie row by row take two chunks per stage, which is one too many for 256 rows.
    for tokens in (64, 128, 256) if _adds_up(form) and not form.rows else (64, 128):
        yield group_cut(form, 2, tokens, chunks, 1, target)
        if rows <= _SHORT_ROWS and tokens <= 128:
            yield group_cut(form, 1, tokens, chunks, 1, target)
            if chunks >= 8:
                yield from (group_cut(form, groups, tokens, chunks, 2, target) for groups in (1, 2))


def _adds_up(form: Form) -> bool:
    """Whether products are just added up, and no sums of groups are scaled."""
    return form.exact or not form.parts


def _time(cut: GroupCut, form: Form, tiles: int, chunks: int, rows: int, target: Target) -> float:
    """Return about how many microseconds a product takes."""
    speed = _PLAIN if _adds_up(form) else _SCALED
    row, chunk = speed.alone if cut.groups == 1 else speed.both
    pieces = -(-tiles // (4 * cut.groups)) * -(-rows // cut.tokens) * cut.shares
    each = chunks / cut.shares * (row * cut.tokens + chunk) + (_PIECE_US if cut.shares == 1 else _SHARED_US)
    return -(-pieces // target.processors) * each


def group_cut(form: Form, groups: int, tokens: int, chunks: int, shares: int, target: Target) -> GroupCut:
    """Return a cut for wgmma with as many stages as help and find room."""
    # Two chunks of 64 inputs are in registers at a time: of one stage, or of two where those of 256 rows are large.
    wide = 2 if chunks % 2 == 0 and tokens <= 128 else 1
    pair = chunks // wide % (2 * shares) == 0
    stages = 2 if pair and (wide == 1 or not _adds_up(form)) else 1
    most = target.processors if shares == 1 else 1 << 30
    cut = GroupCut(groups, tokens, wide, stages, 6 if wide == 1 else 5, shares, most)
    while cut.depth > 2 and cut.shared_bytes(form) + cut.fixed_bytes > target.shared_bytes:
        cut = cut._replace(depth=cut.depth - 1)
    return cut


def _many_rows(form: Form, tiles: int, chunks: int, tokens: int, rows: int, target: Target) -> Cut:
    """Return a cut for devices without wgmma: four warps side by side share x, and blocks share the chunks."""
    cuts = (Cut(wide, tokens, 4, min(2, chunks), depth) for wide, depth in ((2, 4), (1, 4), (1, 3), (1, 2)))
    cut = _first_that_fits(cuts, form, target)
    across, down, _ = cut.grid(tiles, rows)
    splits = max(1, min(8, target.processors // (across * down), chunks // 8))
    return cut._replace(splits=splits)


def choose_experts(form: Form, tiles: int, chunks: int, rows: int, blocks: int, target: Target) -> Cut | GroupCut:
    """Return a cut for blocks of so many rows of one expert each, whose weight has so many tiles and chunks."""
    if target.warpgroups and rows >= 32:
        return group_cut(form, 2, rows, chunks, 1, target)
    wide = 4 if rows <= 16 and form.bits == 4 and tiles * blocks >= 16 * target.processors else 2
    across = 1 if rows <= 16 else 2 if rows <= 32 else 4
    warps = min(chunks, 8 if rows <= 16 and chunks >= 16 else 4 if rows <= 32 else 2)
    cuts = (Cut(tiles_, rows, across, warps_, depth) for tiles_, warps_, depth in (
        (wide, warps, 4), (2, warps, 4), (2, warps, 3), (2, 1, 3), (2, 1, 2)))  # fmt: skip
    return _first_that_fits(cuts, form, target)
