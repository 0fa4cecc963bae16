"""
How a product is cut into blocks and warps.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from quantplug_marlin.form import Form


class Cut(NamedTuple):
    """
    What `cuda/multiply.cu` is compiled for, beside the form of its weight; it says what each means.

    Attributes:
        tiles: of 16 outputs per warp.
        tokens: rows of x per block.
        warps_n: warps side by side.
        warps_k: groups of them that share the chunks.
        depth: chunks under way.
        shares: blocks of a cluster that share the chunks.
        blocks: per multiprocessor, for the compiler.
        splits: blocks that share the chunks, whose sums a second launch adds; not part of what is compiled.
    """

    tiles: int
    tokens: int
    warps_n: int
    warps_k: int
    depth: int
    shares: int = 1
    blocks: int = 1
    splits: int = 1

    @property
    def file(self) -> str:
        """The source."""
        return "multiply.cu"

    def definitions(self) -> dict[str, int]:
        """Return what the source is told of it."""
        return {
            "TILES": self.tiles,
            "TOKENS": self.tokens,
            "WARPS_N": self.warps_n,
            "WARPS_K": self.warps_k,
            "DEPTH": self.depth,
            "SHARES": self.shares,
            "BLOCKS": self.blocks,
        }

    @property
    def threads(self) -> int:
        """Of one block."""
        return 32 * self.warps_n * self.warps_k

    def shared_bytes(self, form: Form) -> int:
        """Return the shared memory of one block."""
        scale = {"": 0, "float32": 4}.get(form.scale, 2)
        # Of codes that lie row by row, all outputs of a tile share a scale.
        scales = -(-self.tiles * scale // 16) * 16 if form.rows else self.tiles * form.parts * 16 * (scale + form.zeros)
        stage = self.tiles * form.chunk * 2 * form.bits + scales
        ring = self.warps_k * self.depth * (self.tokens * form.chunk * 2 + self.warps_n * stage)
        sums = self.warps_n * self.tiles * self.tokens // 8 * 512
        copies = self.warps_k + (self.warps_k > 1 and self.shares > 1) if self.warps_k * self.shares > 1 else 0
        return max(ring, copies * sums)

    def grid(self, tiles: int, rows: int) -> tuple[int, int, int]:
        """Return the blocks in x, y and z for so many tiles of 16 outputs and rows of x."""
        wide = -(-tiles // (self.tiles * self.warps_n))
        return wide * self.shares, -(-rows // self.tokens), self.splits


class GroupCut(NamedTuple):
    """
    What `cuda/warpgroup.cu` is compiled for, beside the form of its weight; it says what each means.

    Attributes:
        groups: warpgroups that multiply, of 64 outputs each.
        tokens: rows of x per piece of y.
        chunks: of 64 inputs per stage.
        stages: per turn of the loop.
        depth: stages of memory.
        shares: blocks of a cluster that share the stages of a piece.
        most: blocks at a time, each of which takes one piece after the other; not part of what is compiled.
    """

    groups: int
    tokens: int
    chunks: int
    stages: int
    depth: int
    shares: int = 1
    most: int = 1 << 30

    @property
    def file(self) -> str:
        """The source."""
        return "warpgroup.cu"

    @property
    def splits(self) -> int:
        """Blocks whose sums a second launch adds."""
        return 1

    @property
    def threads(self) -> int:
        """Of one block: a warpgroup that copies beside those that multiply."""
        return 128 * (self.groups + 1)

    def definitions(self) -> dict[str, int]:
        """Return what the source is told of it."""
        return {
            "GROUPS": self.groups,
            "TOKENS": self.tokens,
            "CHUNKS": self.chunks,
            "STAGES": self.stages,
            "DEPTH": self.depth,
            "SHARES": self.shares,
        }

    def boxes(self, form: Form) -> tuple[int, int, int]:
        """Return the bytes of codes, scales and zero points that a tile of 16 outputs has in a stage."""
        parts = 0 if form.rows else self.chunks * form.parts
        aligned = not parts or parts % form.per_group == 0 or form.per_group % parts == 0
        groups = (parts - 1) // form.per_group + (1 if aligned else 2) if parts else 0
        scale = {"": 0, "float32": 4}.get(form.scale, 2)
        return self.chunks * 128 * form.bits, groups * 16 * scale, groups * 16 * form.zeros

    def shared_bytes(self, form: Form) -> int:
        """Return the shared memory of one block that a launch asks for."""
        codes, *others = self.boxes(form)
        beside = sum(-(-4 * size // 128) * 128 for size in others)
        stage = self.chunks * self.tokens * 128 + self.groups * (4 * codes + beside)
        sums = 256 * self.groups * self.tokens if self.shares > 1 else 0
        return max(self.depth * (-(-stage // 1024) * 1024), sums)

    @property
    def fixed_bytes(self) -> int:
        """The shared memory that it has besides: barriers, and where numbers of y are turned round."""
        return 16 * self.depth + 4096 * self.groups

    def grid(self, tiles: int, rows: int) -> tuple[int, int, int]:
        """Return the blocks in x, y and z for so many tiles of 16 outputs and rows of x."""
        pieces = -(-tiles // (4 * self.groups)) * -(-rows // self.tokens)
        return min(pieces, self.most) * self.shares, 1, 1
