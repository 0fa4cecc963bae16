"""
The packing of pack-quantized files: codes as one little-endian stream of bits per row, cut into int32 words.

Code i takes bits `i * bits` and up. With 2, 4 and 8 bits every word holds whole codes; with 3 bits, 32 codes fill three
words and some lie across two. Rows are streams of their own, so bytes can be looked at in place of words: with 3 bits,
three bytes hold eight codes.

The functions go through a layer in pieces that fit a processor's cache, so that fresh memory is written once.
"""

from __future__ import annotations

import torch

from quantplug_compressed_tensors.shapes import word_count

_PIECE_BYTES = 1 << 18


def unpack(words: torch.Tensor, bits: int, *, subtract: int = 0) -> torch.Tensor:
    """
    Read every code of the streams that run along the last axis.

    Args:
        words: int32 `[R, W]`, every row one stream.
        bits: 2, 3, 4 or 8.
        subtract: what to take from each code, modulo 256; the result is then to be viewed as int8.

    Returns:
        uint8 `[R, F]`, contiguous. F counts what fills the words (with 3 bits rounded up to whole periods of eight), so
        it may exceed the number of codes stored; the surplus shows the unused bits.
    """
    rows, width = words.shape
    per_period, period = (3, 8) if bits == 3 else (1, 8 // bits)
    octets = words.reshape(-1).view(torch.uint8).view(rows, 4 * width)  # flat: an axis of 1 may have any stride
    if 4 * width % per_period:
        octets = torch.nn.functional.pad(octets, (0, per_period - 4 * width % per_period))
    periods = octets.shape[1] // per_period
    codes = torch.empty(rows, periods, period, dtype=torch.uint8)
    step = max(1, _PIECE_BYTES // max(1, octets.shape[1]))
    for start in range(0, rows if width else 0, step):
        piece = codes[start : start + step]
        _spread(octets[start : start + step].view(-1, periods, per_period), bits, piece)
        if subtract:
            piece.sub_(subtract)
    return codes.view(rows, periods * period)


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """
    Write codes as streams along the last axis: the inverse of `unpack`.

    Args:
        codes: uint8 `[R, C]`, each below `2 ** bits`; any strides.
        bits: 2, 3, 4 or 8.

    Returns:
        int32 `[R, ceil(C * bits / 32)]`, unused bits 0.
    """
    rows, count = codes.shape
    words = word_count(count, bits)
    per_period, period = (3, 8) if bits == 3 else (1, 8 // bits)
    padded = -(-count // 32) * 32  # a whole number of periods and of words for every width
    octets = torch.zeros(rows, padded // period, per_period, dtype=torch.uint8)
    filled = torch.nn.functional.pad(codes, (0, padded - count)).reshape(rows, padded // period, period)
    for index in range(period):
        byte, shift = divmod(index * bits, 8)
        octets[:, :, byte] |= filled[:, :, index] << shift
        if shift + bits > 8:
            octets[:, :, byte + 1] |= filled[:, :, index] >> (8 - shift)
    return octets.view(rows, padded * bits // 8)[:, : 4 * words].reshape(-1).view(torch.int32).view(rows, words)


def _spread(octets: torch.Tensor, bits: int, codes: torch.Tensor) -> None:
    """Fill codes uint8 `[R, P, C]` from bytes `[R, P, B]`."""
    for index in range(codes.shape[2]):
        byte, shift = divmod(index * bits, 8)
        code = codes[:, :, index]
        torch.bitwise_right_shift(octets[:, :, byte], shift, out=code)
        if shift + bits > 8:
            code.bitwise_or_(octets[:, :, byte + 1] << (8 - shift))
    if bits < 8:
        codes.bitwise_and_((1 << bits) - 1)
