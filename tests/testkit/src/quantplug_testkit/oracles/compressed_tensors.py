"""
pack-quantized: codes raised by half their range and packed into int32 words.

The codes of a row form one little-endian stream of bits: code i takes the bits `i * bits` and up of the stream, word w
its bits `32 * w` and up. Zero points are raised alike, and packed along the first axis. Where the file has another
order, `g_idx` names the group of each input.

A worked example: eleven 3-bit codes from -4 to 3, of which the last crosses into the second word.

>>> row = [[-3, -2, -1, 0, 1, 2, 3, -4, -3, -2, 3]]
>>> words = pack_rows(row, bits=3)
>>> [hex(word & 0xFFFFFFFF) for word in words[0].tolist()]
['0xd11f58d1', '0x1']
>>> unpack_rows(words, bits=3, count=11).tolist() == row
True

Two inputs in groups of one, zero points -8 and 7:

>>> zeros = pack_rows([[-8], [7]], bits=4).T
>>> dequantize(pack_rows([[-8, 7]], bits=4), [[0.5, 2.0]], zeros, None, bits=4, count=2, group_size=1).tolist()
[[0.0, 0.0]]
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from quantplug_testkit.oracles.canonical import group_index

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

Array = np.ndarray[Any, Any]


def pack_rows(codes: ArrayLike, bits: int) -> NDArray[np.int32]:
    """Write signed codes `[N, K]` along the rows, int32 `[N, ceil(K * bits / 32)]`; spare bits are 0."""
    rows = []
    for row in np.asarray(codes, np.int64).tolist():
        stream = sum((code + (1 << (bits - 1))) << (index * bits) for index, code in enumerate(row))
        rows.append([stream >> (32 * word) & 0xFFFFFFFF for word in range(-(-len(row) * bits // 32))])
    return np.array(rows, np.uint32).view(np.int32)


def unpack_rows(words: ArrayLike, bits: int, count: int) -> NDArray[np.int64]:
    """Read `count` signed codes from each row of int32 `[N, W]`."""
    rows = []
    for row in np.asarray(words, np.int32).view(np.uint32).tolist():
        stream = sum(word << (32 * index) for index, word in enumerate(row))
        rows.append([(stream >> (index * bits) & ((1 << bits) - 1)) - (1 << (bits - 1)) for index in range(count)])
    return np.array(rows, np.int64).reshape(len(rows), count)


def dequantize(
    words: ArrayLike,
    scales: ArrayLike,
    zeros: ArrayLike | None,
    g_idx: ArrayLike | None,
    *,
    bits: int,
    count: int,
    group_size: int,
) -> NDArray[np.float64]:
    """
    Return the values `[N, K]`.

    Args:
        words: int32 `[N, W]`.
        scales: `[N, G]`, `[N, 1]` or `[1]`.
        zeros: int32 packed along the first axis, `[ceil(N * bits / 32), G]`; one int8 number `[1]`; or None.
        g_idx: `[K]`, the group of each input; None or -1 in every place for the trivial order.
        bits: width of a code.
        count: K.
        group_size: inputs per group; K or more where rows, or all weights, share a scale.
    """
    codes = unpack_rows(words, bits, count)
    n = len(codes)
    shared = np.broadcast_to(
        np.asarray(scales, np.float64).reshape(-1, np.shape(scales)[-1]), (n, np.shape(scales)[-1])
    )
    subtracted: Array = np.zeros(shared.shape, np.int64)
    if zeros is not None and np.ndim(zeros) == 1:
        subtracted = np.broadcast_to(np.asarray(zeros, np.int64), shared.shape)
    elif zeros is not None:
        subtracted = unpack_rows(np.asarray(zeros).T, bits, n).T
    index = group_index(count, group_size)
    if g_idx is not None and not (np.asarray(g_idx) == -1).all():
        index = np.asarray(g_idx, np.int64)
    return np.asarray((codes - subtracted[:, index]) * shared[:, index], np.float64)
