"""
The byte order that torch's int4 operator wants, found out by asking it once.

Rows come in blocks. A block of B rows is stored input by input, B / 2 bytes each, two rows to a byte: the low nibble of
byte i belongs to the first half of a pair, the high nibble to the second. Vectorised builds pair row i of a block with
row i + B / 2 (64 rows a block with AVX-512, 32 with AVX2); the portable build pairs rows 2 i and 2 i + 1. Source:
`_convert_weight_to_int4pack_for_cpu` in torch's aten/src/ATen/native/cpu/int4mm_kernel.cpp, for blocks that are full.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch

from quantplug_cpu.slots import ROWS


def repeated(byte: int) -> int:
    """Return the int64 of eight equal bytes."""
    return int.from_bytes(bytes([byte]) * 8, "little", signed=True)


LOW_NIBBLES = repeated(0x0F)
"""The low nibble of each of eight bytes."""

_BLOCKS = (64, 32, 16)


class Layout(NamedTuple):
    """
    One byte order.

    Attributes:
        block: rows per block.
        split: whether a byte holds rows i and i + block / 2 of its block, rather than 2 i and 2 i + 1.
    """

    block: int
    split: bool


def halves(rows: torch.Tensor, layout: Layout) -> torch.Tensor:
    """
    Return a view `[..., 2, blocks, block / 2]` of a tensor whose last axis runs over rows: first and second of pairs.
    """
    if layout.split:
        return torch.unflatten(rows, -1, (-1, 2, layout.block // 2)).transpose(-3, -2)
    return torch.unflatten(rows, -1, (-1, layout.block // 2, 2)).movedim(-1, -3)


class Packer:
    """
    Writes nibbles into the operator's order, some inputs of all rows at a time.

    Args:
        out: uint8 `[N, S / 2]`, contiguous; N is a multiple of `ROWS`.
        layout: the byte order.
    """

    def __init__(self, out: torch.Tensor, layout: Layout) -> None:
        size, blocks = layout.block, out.view(-1, out.shape[1] * 2, layout.block // 2)
        # Rows that lie side by side in both orders are moved eight at a time: nibbles stay within their bytes.
        self._lanes = layout.split
        if self._lanes:
            size, blocks = size // 8, blocks.view(torch.int64)
        self._target = blocks.transpose(0, 1)
        self._layout = Layout(size, layout.split)

    def write(self, codes: torch.Tensor, first: int) -> None:
        """Write codes uint8 `[k, N]`, contiguous and below 16, of inputs first … first + k - 1."""
        low, high = halves(codes.view(torch.int64) if self._lanes else codes, self._layout).unbind(-3)
        target = self._target[first : first + codes.shape[0]]
        torch.bitwise_left_shift(high, 4, out=target)
        target.bitwise_or_(low)


def unpack(packed: torch.Tensor, begin: int, end: int, planes: int, layout: Layout) -> torch.Tensor:
    """
    Read the codes of rows begin … end - 1, whole blocks.

    Args:
        packed: uint8 `[N, planes * S / 2]`, contiguous.
        begin: first row.
        end: row behind the last one.
        planes: 1 when codes are nibbles; 2 when inputs S … 2 S - 1 hold the lower halves of 8-bit codes.
        layout: the byte order.

    Returns:
        uint8 `[S, n]`, contiguous, the rows in the order of `halves`.
    """
    inputs = packed.shape[1] * 2
    words = packed.view(-1, inputs, layout.block // 2)[begin // layout.block : end // layout.block].view(torch.int64)
    words = words.transpose(0, 1).reshape(planes, inputs // planes, -1)
    codes = torch.empty(words.shape[1], 2, words.shape[2], dtype=torch.int64)
    first, second = codes.unbind(1)
    torch.bitwise_and(words[0], LOW_NIBBLES, out=first)
    if planes == 1:
        torch.bitwise_right_shift(words[0], 4, out=second)
        second.bitwise_and_(LOW_NIBBLES)
    else:
        first.bitwise_left_shift_(4).bitwise_or_(words[1] & LOW_NIBBLES)
        torch.bitwise_right_shift(words[1], 4, out=second)
        second.bitwise_and_(LOW_NIBBLES).bitwise_or_(words[0] & ~LOW_NIBBLES)
    return codes.view(torch.uint8).view(words.shape[1], -1)


@cache
def detect() -> Layout | None:
    """Return this machine's byte order, None when torch has one that is not known here. Asked once per process."""
    rows, inputs = 2 * ROWS, 6
    codes = (torch.arange(rows * inputs).view(inputs, rows) * 7919 % 1009 % 16).to(torch.uint8)
    wanted = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.t().to(torch.int32), 1)
    for block in _BLOCKS:
        for split in (True, False):
            found = torch.empty(rows, inputs // 2, dtype=torch.uint8)
            Packer(found, Layout(block, split)).write(codes, 0)
            if torch.equal(found, wanted.view_as(found)):
                return Layout(block, split)
    return None


def known() -> Layout:
    """
    Return this machine's byte order.

    Raises:
        NotImplementedError: it is not known; `probe` says so before anything is prepared.
    """
    layout = detect()
    if layout is None:
        raise NotImplementedError(f"torch {torch.__version__} packs int4 weights in an unknown order")
    return layout
