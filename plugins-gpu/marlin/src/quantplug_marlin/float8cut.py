"""
How a product of experts in FP8 is cut into pieces. The times come from one H100: see the README.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from quantplug_marlin.device import Target

ROWS = 128
"""Of a piece, all of one expert."""
INPUTS = 128
"""Of a stage."""

_DEEPEST = 8
_BUFFERS = 8 * 2048
"""Bytes of shared memory where numbers of y are turned round."""

_TIMES = {208: (0.63, 4.3), 192: (0.57, 4.4), 128: (0.45, 3.5), 64: (0.33, 1.5)}
"""Outputs of a piece -> microseconds that a stage of it takes, and what it takes besides."""
_BYTES_PER_US = 2.3e4
"""Of weights that a multiprocessor is given where all of them read."""
_MOST_IN_ONE_PART = 128
"""Outputs whose sums registers hold twice over, and the most that suit weights that are read for few rows."""


class Float8Cut(NamedTuple):
    """
    What `cuda/float8.cu` is compiled for; it says what each means.

    Attributes:
        wide: outputs of a piece.
        parts: halves of them that take turns, or stages do (1).
        depth: stages of memory.
    """

    wide: int
    parts: int
    depth: int

    @property
    def file(self) -> str:
        """The source."""
        return "float8.cu"

    @property
    def threads(self) -> int:
        """Of one block: a warpgroup that copies beside two that multiply."""
        return 384

    def definitions(self, product: int, *, half: bool) -> dict[str, int]:
        """Return what the source is told of it, for the first or the second product of a mixture."""
        return {"WIDE": self.wide, "PARTS": self.parts, "DEPTH": self.depth, "PRODUCT": product, "HALF": int(half)}

    @property
    def shared_bytes(self) -> int:
        """The shared memory of one block that a launch asks for: stages, and scales of pieces under way."""
        return self.depth * INPUTS * (ROWS + self.wide) + (self.depth + 1) * 4 * (ROWS + self.wide)

    def pieces(self, outputs: int, blocks: int) -> int:
        """Return how many pieces there are of so many outputs and blocks of rows."""
        return -(-outputs // self.wide) * blocks


def cut_of(wide: int, target: Target) -> Float8Cut:
    """Return the cut into pieces of so many outputs, with as many stages as find room."""
    cut = Float8Cut(wide, 1 if wide <= _MOST_IN_ONE_PART else 2, _DEEPEST)
    while cut.shared_bytes + _BUFFERS + 16 * cut.depth > target.shared_bytes:
        cut = cut._replace(depth=cut.depth - 1)
    return cut


def every_cut(target: Target) -> list[Float8Cut]:
    """Return all cuts that `choose` may name."""
    return [cut_of(wide, target) for wide in _TIMES]


def choose(outputs: int, inputs: int, choices: int, experts: int, target: Target) -> Float8Cut:
    """Return a cut for so many outputs and inputs of an expert, and choices that a router makes at random."""
    blocks = likely_blocks(choices, experts)
    share = blocks / min(choices, experts)  # blocks that read the same weights
    cuts = [cut for cut in every_cut(target) if share > 1 or cut.wide <= _MOST_IN_ONE_PART]

    def time(cut: Float8Cut) -> float:
        stage, besides = _TIMES[cut.wide]
        rounds, stages = -(-cut.pieces(outputs, blocks) // target.processors), -(-inputs // INPUTS)
        return rounds * max(stages * stage + besides, stages * cut.wide * INPUTS / _BYTES_PER_US / share)

    return min(cuts, key=time)


def likely_blocks(choices: int, experts: int) -> int:
    """Return about how many blocks of rows they take: the last one of an expert is half full."""
    chosen = min(choices, experts)
    return chosen if choices <= chosen * ROWS // 2 else round(choices / ROWS + chosen / 2)
