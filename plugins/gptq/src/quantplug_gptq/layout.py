"""
GPTQ's packing: codes as one little-endian stream of bits along an axis, cut into int32 words.

Code i takes bits `i * bits` and up. With 2, 4 and 8 bits every word holds whole codes; with 3 bits, 32 codes fill three
words and two of them cross from one word into the next. The functions below work along the first axis, all columns at
once: words are cut into bytes, then eight bytes at a time into codes.

They go through a layer in pieces that fit a processor's cache, so that fresh memory is written once and not read again.
"""

from __future__ import annotations

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
    words = words.reshape(periods, period_words, columns)
    codes = torch.empty(periods, period_codes, columns, dtype=torch.uint8)
    step = max(1, _PIECE_WORDS // max(1, period_words * columns))
    scratch = torch.empty(min(step, periods), columns, dtype=torch.int32)
    spread = _spread_three if bits == 3 else _spread
    for start in range(0, periods if columns else 0, step):
        piece = codes[start : start + step]
        spread(words[start : start + step], bits, piece, scratch[: piece.shape[0]])
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


def _cut(words: torch.Tensor, out: torch.Tensor, scratch: torch.Tensor) -> None:
    """Fill bytes uint8 `[P, 4 * W, N]` from words int32 `[P, W, N]`; scratch is int32 `[P, N]`."""
    for index in range(out.shape[1]):
        word, byte = divmod(index, 4)
        source = words[:, word]
        if byte:
            source = torch.bitwise_right_shift(source, 8 * byte, out=scratch)
        out[:, index].copy_(source)  # a cast to uint8 keeps the low byte


def _spread(words: torch.Tensor, bits: int, codes: torch.Tensor, scratch: torch.Tensor) -> None:
    """Fill codes uint8 `[P, C, N]` from words of 2-, 4- or 8-bit codes."""
    per_byte = 8 // bits
    _cut(words, codes[:, ::per_byte], scratch)
    if per_byte == 1:
        return
    lanes, one = _lanes(codes)
    for field in range(1, per_byte):
        torch.bitwise_right_shift(lanes[:, ::per_byte], bits * field, out=lanes[:, field::per_byte])
    lanes.bitwise_and_(((1 << bits) - 1) * one)


def _spread_three(words: torch.Tensor, bits: int, codes: torch.Tensor, scratch: torch.Tensor) -> None:
    """Fill codes uint8 `[P, 32, N]` from words of 3-bit codes: three bytes hold eight of them."""
    periods, _, columns = words.shape
    cut = torch.empty(periods, 12, columns, dtype=torch.uint8)
    _cut(words, cut, scratch)
    source, one = _lanes(cut.view(periods * 4, 3, columns))
    target, _ = _lanes(codes.view(periods * 4, 8, columns))
    for index in range(8):
        byte, shift = divmod(index * bits, 8)
        torch.bitwise_right_shift(source[:, byte], shift, out=target[:, index])
        if shift + bits > 8:
            low = (1 << (8 - shift)) - 1
            target[:, index].bitwise_and_(low * one)
            target[:, index].bitwise_or_((source[:, byte + 1] << (8 - shift)).bitwise_and_((7 - low) * one))
    target.bitwise_and_(7 * one)
