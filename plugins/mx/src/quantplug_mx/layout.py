"""
Two codes of four bits in one byte, the first in the low nibble.

Both ways work on words of two bytes, so that a pair is moved at once; a word's low byte lies first in memory.
"""

from __future__ import annotations

import torch

_NIBBLES = 0x0F0F


def unpack_nibbles(packed: torch.Tensor) -> torch.Tensor:
    """Return the codes uint8 `[N, 2 P]` of packed bytes uint8 `[N, P]`, fresh and contiguous."""
    words = packed.to(torch.int16, memory_format=torch.contiguous_format)
    words |= words << 4
    return words.bitwise_and_(_NIBBLES).view(torch.uint8)


def pack_nibbles(codes: torch.Tensor) -> torch.Tensor:
    """Return packed bytes uint8 `[N, K / 2]` of codes uint8 `[N, K]` below 16; K is even."""
    words = codes.contiguous().view(torch.int16)
    return (words | words >> 4).bitwise_and_(0xFF).to(torch.uint8)
