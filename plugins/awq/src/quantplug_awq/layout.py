"""
AWQ's packing: eight 4-bit codes per int32 word.

GEMM's layout packs along N: word w of a row holds the codes of columns 8w to 8w + 7, from the lowest bits up in the
order 0, 2, 4, 6, 1, 3, 5, 7. GEMV's layout packs along K, in plain order. Reading goes through a tensor in pieces that
fit a processor's cache.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

GEMM_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Column of the code in each field of a word, lowest bits first."""
PLAIN_ORDER = (0, 1, 2, 3, 4, 5, 6, 7)

_PIECE_WORDS = 1 << 16
# A word is put into 64 bits and its fields are moved apart in three steps, each of which keeps what its mask has:
# bytes 0 and 2 stay, bytes 1 and 3 go to the upper half; then both bytes of each half next to each other, which hold
# columns 0, 2, 1, 3 (and 4, 6, 5, 7); then each second field to a place of its own.
_LOWER_BYTES = 0x0000_0000_00FF_00FF
_UPPER_BYTES = 0x00FF_00FF_0000_0000
_NEIGHBOURS = 0x0000_FFFF_0000_FFFF
_FIELDS = 0x0F0F_0F0F_0F0F_0F0F


def unpack_columns(words: torch.Tensor, *, subtract: int = 0) -> torch.Tensor:
    """
    Read codes in GEMM's order.

    Args:
        words: int32 `[R, C]`.
        subtract: what to take from each code, modulo 256; the result is then to be viewed as int8.

    Returns:
        uint8 `[R, 8 C]`, contiguous.
    """
    rows, columns = words.shape
    codes = torch.empty(rows, columns, dtype=torch.int64)
    for piece in _pieces(rows, columns):
        lanes = codes[piece].copy_(words[piece])
        moved = lanes << 24
        lanes.bitwise_and_(_LOWER_BYTES).bitwise_or_(moved.bitwise_and_(_UPPER_BYTES))
        torch.bitwise_right_shift(lanes, 8, out=moved)
        lanes.bitwise_or_(moved).bitwise_and_(_NEIGHBOURS)
        torch.bitwise_left_shift(lanes, 12, out=moved)
        lanes.bitwise_or_(moved).bitwise_and_(_FIELDS)
        if subtract:
            lanes.view(torch.uint8).sub_(subtract)
    return codes.view(torch.uint8)


def unpack_rows(words: torch.Tensor, *, subtract: int = 0) -> torch.Tensor:
    """
    Read codes in plain order.

    Args:
        words: int32 `[R, C]`.
        subtract: as for `unpack_columns`.

    Returns:
        uint8 `[R, 8 C]`, contiguous.
    """
    rows, columns = words.shape
    codes = torch.empty(rows, 4 * columns, dtype=torch.int16)
    for piece in _pieces(rows, columns):
        target = codes[piece]
        octets = words[piece].reshape(-1).view(torch.uint8).view(target.shape).to(torch.int16)
        torch.bitwise_or(octets, octets << 4, out=target).bitwise_and_(0x0F0F)
        if subtract:
            target.view(torch.uint8).sub_(subtract)
    return codes.view(torch.uint8)


def pack(codes: torch.Tensor, order: Sequence[int]) -> torch.Tensor:
    """
    Write codes along the second axis: the inverse of `unpack_columns` or, in plain order, of `unpack_rows`.

    Args:
        codes: uint8 `[R, 8 C]`, each below 16.
        order: place within its eight of the code in each field of a word.

    Returns:
        int32 `[R, C]`.
    """
    rows, count = codes.shape
    eights = codes.contiguous().view(rows, count // 8, 8)
    words = torch.zeros(rows, count // 8, dtype=torch.int32)
    for field, place in enumerate(order):
        words |= eights[:, :, place].to(torch.int32) << (4 * field)
    return words


def _pieces(rows: int, columns: int) -> list[slice]:
    """Return ranges of rows that are worked on at once."""
    step = max(1, _PIECE_WORDS // max(1, columns))
    return [slice(start, start + step) for start in range(0, rows, step)]
