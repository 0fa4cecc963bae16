"""
What the shape of stored scales would fit, for an error that refuses it.
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from quantplug.spec import LinearShape


def fitting(size: tuple[int, ...], shape: LinearShape) -> str:
    """Say what scales of this shape are to a weight of that size."""
    n, k = shape.out_features, shape.in_features
    if prod(size) == 1:
        return _fits("strategy 'tensor'")
    if size in ((n,), (n, 1)):
        return _fits("strategy 'channel'")
    if len(size) == 1 and size[0] < n:
        return (
            f"The file has {size[0]} scales for one weight of {n} rows, as layers have that were fused with a scale "
            "for each part. Which rows a part has is not stored; use a copy of the model whose layers are not fused."
        )
    if len(size) == 2 and 0 not in size:
        rows, inputs = _side(n, size[0]), _side(k, size[1])
        if rows == 1 and inputs:
            return _fits(f"strategy 'group' and group_size {inputs}")
        if rows and inputs:
            return _fits(f"strategy 'block', {rows} x {inputs}")
    return "The shapes fit no FP8 layer; the file is damaged or of another format."


def _side(length: int, count: int) -> int:
    """Return the usual size of parts of which `count` cover a length, else any, else 0."""
    usual = (1, 128, 64, 256, 32, 16, 512, 1024)
    return next((part for part in (*usual, -(-length // count)) if part and -(-length // part) == count), 0)


def _fits(what: str) -> str:
    return f"The shapes fit {what}; correct the configuration if it is wrong."
