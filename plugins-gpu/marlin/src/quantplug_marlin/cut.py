"""
How a product is cut into blocks and warps.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from quantplug_marlin.form import Form

CAPACITY = 227 * 1024
"""Bytes of shared memory per block and multiprocessor, from compute capability 9.0 on; 8.0 has 163 KiB, 8.6 99 KiB."""


class Cut(NamedTuple):
    """
    What a kernel is compiled for, beside the form of its weight; `cuda/multiply.cu` says what each means.

    Attributes:
        tiles: of 16 outputs per warp.
        tokens: rows of x per block.
        warps_n: warps side by side.
        warps_k: groups of them that share the chunks.
        depth: chunks under way.
        shares: blocks of a cluster that share the chunks.
        blocks: per multiprocessor, for the compiler.
        warpgroup: whether wgmma multiplies.
        splits: blocks that share the chunks, whose sums a second launch adds; not part of what is compiled.
    """

    tiles: int
    tokens: int
    warps_n: int
    warps_k: int
    depth: int
    shares: int = 1
    blocks: int = 1
    warpgroup: bool = False
    splits: int = 1

    def definitions(self) -> dict[str, int]:
        """Return what `cuda/multiply.cu` is told of it."""
        return {
            "TILES": self.tiles,
            "TOKENS": self.tokens,
            "WARPS_N": self.warps_n,
            "WARPS_K": self.warps_k,
            "DEPTH": self.depth,
            "SHARES": self.shares,
            "BLOCKS": self.blocks,
            "WARPGROUP": int(self.warpgroup),
        }

    @property
    def threads(self) -> int:
        """Of one block."""
        return 32 * self.warps_n * self.warps_k

    def shared_bytes(self, form: Form) -> int:
        """Return the shared memory of one block."""
        scale = {"": 0, "float32": 4}.get(form.scale, 2)
        stage = self.tiles * (128 * form.bits + form.parts * 16 * (scale + form.zeros))
        ring = self.warps_k * self.depth * (self.tokens * 128 + self.warps_n * stage)
        sums = self.warps_n * self.tiles * self.tokens // 8 * 512
        copies = self.warps_k + (self.warps_k > 1 and self.shares > 1) if self.warps_k * self.shares > 1 else 0
        return max(ring, copies * sums)

    def grid(self, tiles: int, rows: int) -> tuple[int, int, int]:
        """Return the blocks in x, y and z for so many tiles of 16 outputs and rows of x."""
        wide = -(-tiles // (self.tiles * self.warps_n))
        return wide * self.shares, -(-rows // self.tokens), self.splits
