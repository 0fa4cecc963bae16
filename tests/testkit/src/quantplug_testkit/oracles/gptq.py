"""
GPTQ's stored tensors: codes packed into int32 words as one little-endian stream of bits.

Code i takes the bits `i * bits` and up of the stream, word w its bits `32 * w` and up, so with 3 bits some codes cross
from one word into the next. `qweight` packs along K (each column is a stream), `qzeros` along N (each row is one).
Version 1 of the format stores every zero point less one; reading adds one and keeps the low `bits` bits. Some writers
(GPTQModel, for 2, 4 and 8 bits) subtract from whole words, so that a zero point of 0 borrows from the next one in its
word; what they wrote is read by adding to whole words.

A worked example: eleven 3-bit codes, of which the last crosses into the second word.

>>> column = np.array([[1], [2], [3], [4], [5], [6], [7], [0], [1], [2], [7]], np.uint8)
>>> words = pack_rows(column, bits=3)
>>> [hex(int(word) & 0xFFFFFFFF) for word in words[:, 0]]
['0xd11f58d1', '0x1']
>>> unpack_rows(words, bits=3, count=11).tolist() == column.tolist()
True

Two inputs and eight outputs of 4 bits in one group, version 1: the stored zero point 7 means 8.

>>> qweight = pack_rows(np.array([[9] * 8, [6] * 8], np.uint8), bits=4)
>>> qzeros = pack_columns(np.array([[7] * 8], np.uint8), bits=4)
>>> scales = np.full((1, 8), 0.5, np.float16)
>>> dequantize(qweight, qzeros, scales, np.zeros(2, np.int32), 4, -1, v2=False, sym=True)[0].tolist()
[0.5, -1.0]
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from quantplug_testkit.oracles.canonical import group_index

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

Array = np.ndarray[Any, Any]

_WORD = 0xFFFFFFFF


def unpack_rows(words: Array, bits: int, count: int) -> NDArray[np.uint8]:
    """
    Read codes packed along the first axis.

    Args:
        words: int32 `[R, N]`, every column a stream.
        bits: width of one code.
        count: K, the number of codes per column.

    Returns:
        uint8 `[K, N]`.
    """
    columns = [_read(words[:, n].tolist(), bits, count) for n in range(words.shape[1])]
    return np.array(columns, np.uint8).reshape(words.shape[1], count).T


def pack_rows(codes: Array, bits: int) -> NDArray[np.int32]:
    """Write codes uint8 `[K, N]` along the first axis, int32 `[ceil(K * bits / 32), N]`; spare bits are 0."""
    rows = -(-codes.shape[0] * bits // 32)
    columns = [_write(codes[:, n].tolist(), bits, rows) for n in range(codes.shape[1])]
    return np.array(columns, np.uint32).reshape(codes.shape[1], rows).T.view(np.int32)


def unpack_columns(words: Array, bits: int, count: int) -> NDArray[np.uint8]:
    """
    Read codes packed along the second axis.

    Args:
        words: int32 `[G, C]`, every row a stream.
        bits: width of one code.
        count: N, the number of codes per row.

    Returns:
        uint8 `[G, N]`.
    """
    return unpack_rows(words.T, bits, count).T


def pack_columns(codes: Array, bits: int) -> NDArray[np.int32]:
    """Write codes uint8 `[G, N]` along the second axis, int32 `[G, ceil(N * bits / 32)]`; spare bits are 0."""
    return pack_rows(codes.T, bits).T


def zero_points(
    qzeros: Array, bits: int, out_features: int, *, v2: bool, whole_words: bool = False
) -> NDArray[np.int64]:
    """Return the zero points `[G, N]` that `qzeros` int32 `[G, C]` stands for; `whole_words` as for `dequantize`."""
    if whole_words:
        ones = sum(1 << position for position in range(0, 32, bits))
        qzeros = ((qzeros.astype(np.int64) + ones) & _WORD).astype(np.uint32).view(np.int32)
    stored = unpack_columns(qzeros, bits, out_features).astype(np.int64)
    return stored if v2 or whole_words else (stored + 1) & ((1 << bits) - 1)


def dequantize(
    qweight: Array,
    qzeros: Array,
    scales: Array,
    g_idx: Array | None,
    bits: int,
    group_size: int,
    *,
    v2: bool,
    sym: bool,
    whole_words: bool = False,
) -> NDArray[np.float64]:
    """
    Return the values of one layer, float64 `[N, K]`.

    Args:
        qweight: int32 `[ceil(K * bits / 32), N]`.
        qzeros: int32 `[G, ceil(N * bits / 32)]`.
        scales: `[G, N]`, any float dtype.
        g_idx: int32 `[K]`, group of each input, or None when input k belongs to group `k // group_size`; then K is
            taken to fill `qweight`.
        bits: 2, 3, 4 or 8.
        group_size: inputs per group; -1 for one group over all of K.
        v2: whether zero points are stored as they are (`checkpoint_format` "gptq_v2").
        sym: whether the file calls itself symmetric, which means that every zero point is `2 ** (bits - 1)`.
        whole_words: whether a version 1 writer subtracted from whole words; not for 3 bits, which cross words.

    Raises:
        ValueError: the file calls itself symmetric and a zero point is another.
    """
    in_features = qweight.shape[0] * 32 // bits if g_idx is None else len(g_idx)
    index = group_index(in_features, group_size) if g_idx is None else np.asarray(g_idx, np.int64)
    codes = unpack_rows(qweight, bits, in_features).astype(np.int64)
    zeros = zero_points(qzeros, bits, scales.shape[1], v2=v2, whole_words=whole_words)
    if sym and (zeros != 1 << (bits - 1)).any():
        raise ValueError(f"a symmetric file with zero points {sorted(set(zeros.ravel().tolist()))}")
    values = np.empty(codes.shape, np.float64)
    for k in range(in_features):
        values[k] = (codes[k] - zeros[index[k]]) * scales[index[k]].astype(np.float64)
    return values.T


def _read(words: Sequence[int], bits: int, count: int) -> list[int]:
    stream = sum((word & _WORD) << (32 * position) for position, word in enumerate(words))
    return [(stream >> (bits * position)) & ((1 << bits) - 1) for position in range(count)]


def _write(codes: Sequence[int], bits: int, words: int) -> list[int]:
    if any(code >> bits for code in codes):
        raise ValueError(f"a code of {max(codes)} does not fit into {bits} bits")
    stream = sum(code << (bits * position) for position, code in enumerate(codes))
    return [(stream >> (32 * position)) & _WORD for position in range(words)]
