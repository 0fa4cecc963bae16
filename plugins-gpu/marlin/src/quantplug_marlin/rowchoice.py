"""
Which cut suits a product with weights that lie row by row. The rules come from sweeps on one H100: see the README.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantplug_marlin.choice import choose_warpgroups, every_warpgroups_choice
from quantplug_marlin.cut import Cut

if TYPE_CHECKING:
    from collections.abc import Iterator

    from quantplug_marlin.cut import GroupCut
    from quantplug_marlin.device import Target
    from quantplug_marlin.form import Form

_LONG = 64
"""Chunks of 128 inputs from which on one more under way helps."""
_MOST_FEW = 32
"""Rows that mma serves where there is wgmma, too."""


def choose_rows(form: Form, tiles: int, chunks: int, rows: int, target: Target) -> Cut | GroupCut:
    """Return a cut for a weight of so many tiles of 16 outputs and chunks of 128 inputs, and rows of x."""
    if rows > _MOST_FEW and target.warpgroups:
        return choose_warpgroups(form, tiles, 2 * chunks, rows, target)
    cuts = _cuts(tiles, chunks, rows, target)
    return next(cut for cut in cuts if cut.shared_bytes(form) <= target.shared_bytes)


def every_rows_choice(form: Form, tiles: int, chunks: int, target: Target) -> set[Cut | GroupCut]:
    """Return all cuts that `choose_rows` may name for a weight, whatever the number of rows."""
    few = {choose_rows(form, tiles, chunks, rows, target) for rows in (1, 16, 32, 64)}
    return few | every_warpgroups_choice(form, tiles, 2 * chunks, target) if target.warpgroups else few


def _cuts(tiles: int, chunks: int, rows: int, target: Target) -> Iterator[Cut]:
    """Yield cuts for mma, the best first: blocks wide enough for all to run at once, warps side by side share x."""
    per_processor = -(-tiles // target.processors)
    tokens = 8 if rows <= 8 else 16 if rows <= 16 else 32 if rows <= 32 else 64
    if tokens == 8:
        if per_processor <= 2:
            yield Cut(1, 8, 2, min(8, chunks), 4 if chunks > _LONG else 3)
        yield Cut(1, 8, 2, min(4, chunks), 4)
    elif per_processor <= 2:
        yield Cut(1, tokens, 2, min(8, chunks), 3)
        yield Cut(1, tokens, 2, min(8, chunks), 2)
    elif tokens == 16:
        yield Cut(2, 16, 2, min(4, chunks), 4) if per_processor <= 4 else Cut(1, 16, 4, min(2, chunks), 4)
    elif per_processor <= 4:
        yield Cut(2, tokens, 2, min(4, chunks), 3)
    yield from (Cut(2, tokens, 4, min(2, chunks), depth) for depth in (3, 2))
    yield from (Cut(1, tokens, 2, 1, depth) for depth in (3, 2))
