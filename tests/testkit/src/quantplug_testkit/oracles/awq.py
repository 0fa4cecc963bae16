"""
AWQ's stored tensors: eight 4-bit codes per int32 word, zero points as they are, `value = (code - zero) * scale`.

GEMM's layout packs along N: the fields of a word, from its lowest bits up, belong to the columns 0, 2, 4, 6, 1, 3, 5
and 7 of its eight. `qweight` is `[K, N / 8]`, `qzeros` `[G, N / 8]` in the same order, `scales` `[G, N]`. GEMV's layout
packs along K in plain order: `qweight` `[N, K / 8]`, `qzeros` `[N, W]`, `scales` `[N, 8 W]`, and columns of both beyond
the last group are 0. W is the words for G zero points, rounded up to 2 for groups of 64, to 4 for 32, to 8 for 16.

A worked example, one input and eight outputs: code n for column n.

>>> word = pack(np.arange(8)[None, :], GEMM_FIELDS)
>>> hex(int(word[0, 0]) & 0xFFFFFFFF)
'0x75316420'
>>> unpack(word, GEMM_FIELDS)[0].tolist()
[0, 1, 2, 3, 4, 5, 6, 7]
>>> hex(int(pack(np.arange(8)[None, :], GEMV_FIELDS)[0, 0]))
'0x76543210'
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

Array = np.ndarray[Any, Any]

GEMM_FIELDS = (0, 2, 4, 6, 1, 3, 5, 7)
GEMV_FIELDS = (0, 1, 2, 3, 4, 5, 6, 7)
_WIDENED = {16: 8, 32: 4, 64: 2}


def pack(codes: Array, fields: Sequence[int]) -> NDArray[np.int32]:
    """Write codes `[R, 8 C]` along the second axis, int32 `[R, C]`; field i of a word belongs to column `fields[i]`."""
    words = [
        [
            sum(int(row[8 * word + column]) << (4 * i) for i, column in enumerate(fields))
            for word in range(len(row) // 8)
        ]
        for row in codes
    ]
    return np.array(words, np.uint32).reshape(codes.shape[0], codes.shape[1] // 8).view(np.int32)


def unpack(words: Array, fields: Sequence[int]) -> NDArray[np.int64]:
    """Read codes `[R, 8 C]` from int32 `[R, C]`: the inverse of `pack`."""
    codes = np.empty((words.shape[0], 8 * words.shape[1]), np.int64)
    for row in range(words.shape[0]):
        for word in range(words.shape[1]):
            for i, column in enumerate(fields):
                codes[row, 8 * word + column] = (int(words[row, word]) & 0xFFFFFFFF) >> (4 * i) & 15
    return codes


def zero_words(groups: int, group_size: int) -> int:
    """Return W, the words of zero points per row in GEMV's layout."""
    unit, words = _WIDENED.get(group_size, 1), (groups + 7) // 8
    return (words + unit - 1) // unit * unit


def dequantize(qweight: Array, qzeros: Array, scales: Array, group_size: int, version: str) -> NDArray[np.float64]:
    """
    Return the values of one layer, float64 `[N, K]`; exact.

    Args:
        qweight: int32.
        qzeros: int32.
        scales: any float.
        group_size: inputs per group, -1 for all.
        version: "gemm" or "gemv".
    """
    if version == "gemm":
        codes, zeros = unpack(qweight, GEMM_FIELDS).T, unpack(qzeros, GEMM_FIELDS).T
        scales = scales.T
    else:
        codes, zeros = unpack(qweight, GEMV_FIELDS), unpack(qzeros, GEMV_FIELDS)
    values = np.empty(codes.shape, np.float64)
    for k in range(codes.shape[1]):
        group = 0 if group_size == -1 else k // group_size
        values[:, k] = (codes[:, k] - zeros[:, group]) * scales[:, group].astype(np.float64)
    return values
