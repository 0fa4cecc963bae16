"""
The account of a load: every tensor claimed once, every element of every parameter written once.

It knows names and intervals, not tensors, so that a framework's own loader can drive it, too.
"""

from __future__ import annotations

from bisect import bisect_right
from math import prod

from quantplug.errors import LoadError

Box = tuple[tuple[int, int], ...]
"""One half-open interval per axis."""


class Ledger:
    """Who claimed which checkpoint tensor, and which boxes of which parameters were written."""

    def __init__(self) -> None:
        self._claims: dict[str, str] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._written: dict[str, list[Box]] = {}
        self._open: dict[str, int] = {}

    def claim(self, tensor: str, owner: str) -> None:
        """
        Record that `owner` consumes a checkpoint tensor.

        Raises:
            LoadError: `QP-LOAD-CLAIM` when it is already claimed; naming both.
        """
        first = self._claims.setdefault(tensor, owner)
        if first != owner:
            raise LoadError(
                "QP-LOAD-CLAIM", tensor, f"claimed by {owner} and by {first}", expected="exactly one module to use it"
            )

    def expect(self, parameter: str, shape: tuple[int, ...]) -> None:
        """Record that a parameter of that shape exists and nothing of it is written yet."""
        self._shapes[parameter] = shape
        self._written[parameter] = []
        self._open[parameter] = prod(shape)

    def write(self, parameter: str, box: Box | None = None) -> None:
        """
        Record that a box of a parameter (all of it by default) was written.

        Raises:
            LoadError: `QP-LOAD-OVERLAP` when part of it was written before or lies outside the parameter.
        """
        shape = self._shapes[parameter]
        box = tuple((0, size) for size in shape) if box is None else box
        if len(box) != len(shape) or any(not 0 <= a <= b <= n for (a, b), n in zip(box, shape, strict=True)):
            raise LoadError("QP-LOAD-OVERLAP", parameter, f"{_show(box)} was written", expected=f"inside {list(shape)}")
        written = self._written[parameter]
        # Kept sorted by the first axis: loaders write shard after shard, so neighbours are all that can overlap there.
        place = bisect_right(written, box)
        for other in written if len(shape) > 1 else written[max(0, place - 1) : place + 1]:
            if all(max(a, c) < min(b, d) for (a, b), (c, d) in zip(box, other, strict=True)):
                raise LoadError(
                    "QP-LOAD-OVERLAP",
                    parameter,
                    f"{_show(box)} was written over {_show(other)}",
                    expected="every element to be written once",
                )
        written.insert(place, box)
        self._open[parameter] -= prod(b - a for a, b in box)

    def close(self, owner: str = "") -> None:
        """
        Check that every element of every parameter (of one owner) was written.

        Raises:
            LoadError: `QP-LOAD-UNFILLED` listing the parameters with the number of elements never written.
        """
        unfilled = [
            f"{name} ({count} of {prod(self._shapes[name])} elements)"
            for name, count in self._open.items()
            if count and (not owner or name.startswith(f"{owner}."))
        ]
        if unfilled:
            shown = ", ".join(unfilled[:20]) + (f" and {len(unfilled) - 20} more" if len(unfilled) > 20 else "")
            raise LoadError(
                "QP-LOAD-UNFILLED",
                owner or "load",
                f"never written: {shown}",
                expected="every element to be written once",
                fix="A shard is missing from the checkpoint, or its loader skipped it.",
            )


def _show(box: Box) -> str:
    return "[" + ", ".join(f"{a}:{b}" for a, b in box) + "]"
