"""
GPTQ's packing: codes as one little-endian stream of bits along an axis, cut into int32 words.

Code i takes bits `i * bits` and up. With 2, 4 and 8 bits every word holds whole codes; with 3 bits, 32 codes fill three
words and two of them cross from one word into the next. The functions below work along the first axis, all columns at
once: words are cut into bytes, then eight bytes at a time into codes.

They go through a layer in pieces that fit a processor's cache, so that fresh memory is written once and not read again.
"""

from __future__ import annotations

from functools import lru_cache

import torch

_PIECE_WORDS = 1 << 17
_ONE_PER_BYTE = 0x0101_0101_0101_0101


def unpack_rows(words: torch.Tensor, bits: int, *, subtract: int = 0) -> torch.Tensor:
    """
    Read every code of the streams that run along the first axis.

    Args:
        words: int32 `[R, N]`, every column one stream.
        bits: 2, 3, 4 or 8.
        subtract: what to take from each code, modulo 256; the result is then to be viewed as int8.

    Returns:
        uint8 `[F, N]`, contiguous. F counts whole periods (32 codes per three words for 3 bits, else 32 / bits per
        word), so it may exceed the number of codes stored; the surplus shows the unused bits.
    """
    period_words, period_codes = _period(bits)
    rows, columns = words.shape
    periods = -(-rows // period_words)
    if rows != periods * period_words:
        words = torch.nn.functional.pad(words, (0, 0, 0, periods * period_words - rows))
    octets = words.reshape(-1).view(torch.uint8).view(periods, period_words, columns, 4).transpose(2, 3)
    codes = torch.empty(periods, period_codes, columns, dtype=torch.uint8)
    step = max(1, _PIECE_WORDS // max(1, period_words * columns))
    spread = _spread_three if bits == 3 else _spread
    for start in range(0, periods if columns else 0, step):
        piece = codes[start : start + step]
        spread(octets[start : start + step], bits, piece)
        if subtract:
            piece.sub_(subtract)
    return codes.view(periods * period_codes, columns)


def pack_rows(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """
    Write codes as streams along the first axis: the inverse of `unpack_rows`.

    Args:
        codes: uint8 `[K, N]`, each below `2 ** bits`.
        bits: 2, 3, 4 or 8.

    Returns:
        int32 `[ceil(K * bits / 32), N]`, unused bits 0.
    """
    period_words, period_codes = _period(bits)
    count, columns = codes.shape
    periods = -(-count // period_codes)
    codes = torch.nn.functional.pad(codes, (0, 0, 0, periods * period_codes - count))
    codes = codes.reshape(periods, period_codes, columns)
    words = torch.zeros(periods, period_words, columns, dtype=torch.int32)
    for index in range(period_codes):
        word, shift = divmod(index * bits, 32)
        code = codes[:, index].to(torch.int32)
        words[:, word] |= code << shift
        if shift + bits > 32:
            words[:, word + 1] |= code >> (32 - shift)
    return words.view(periods * period_words, columns)[: -(-count * bits // 32)].contiguous()


@lru_cache(maxsize=64)
def constant_words(code: int, bits: int) -> torch.Tensor:
    """Return the words int32 `[bits]` that 32 equal codes take; not to be modified."""
    return pack_rows(torch.full((32, 1), code, dtype=torch.uint8), bits).view(-1)


def one_per_field(bits: int) -> int:
    """Return the int32 word whose every `bits`-wide field is 1; `bits` divides 32."""
    return sum(1 << shift for shift in range(0, 32, bits))


def _period(bits: int) -> tuple[int, int]:
    """Return (words, codes) of the shortest run of words that holds whole codes."""
    return (3, 32) if bits == 3 else (1, 32 // bits)


def _lanes(codes: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Return bytes eight at a time where rows allow it, and the number that repeats a byte over a lane."""
    if codes.shape[-1] % 8 == 0:
        return codes.view(torch.int64), _ONE_PER_BYTE
    return codes, 1


def _spread(octets: torch.Tensor, bits: int, codes: torch.Tensor) -> None:
    """Fill codes uint8 `[P, C, N]` from the bytes `[P, 1, 4, N]` of words with 2-, 4- or 8-bit codes."""
    per_byte = 8 // bits
    codes[:, ::per_byte].copy_(octets[:, 0])
    if per_byte == 1:
        return
    lanes, one = _lanes(codes)
    for field in range(1, per_byte):
        torch.bitwise_right_shift(lanes[:, ::per_byte], bits * field, out=lanes[:, field::per_byte])
    lanes.bitwise_and_(((1 << bits) - 1) * one)


def _spread_three(octets: torch.Tensor, bits: int, codes: torch.Tensor) -> None:
    """Fill codes uint8 `[P, 32, N]` from the bytes `[P, 3, 4, N]` of words: three bytes hold eight codes."""
    periods, _, _, columns = octets.shape
    source, one = _lanes(octets.contiguous().view(periods * 4, 3, columns))
    target, _ = _lanes(codes.view(periods * 4, 8, columns))
    for index in range(8):
        byte, shift = divmod(index * bits, 8)
        torch.bitwise_right_shift(source[:, byte], shift, out=target[:, index])
        if shift + bits > 8:
            low = (1 << (8 - shift)) - 1
            target[:, index].bitwise_and_(low * one)
            target[:, index].bitwise_or_((source[:, byte + 1] << (8 - shift)).bitwise_and_((7 - low) * one))
    target.bitwise_and_(7 * one)
