"""
MXFP8, MXFP4 and NVFP4: narrow floating-point codes that share a scale with their neighbours along K.

An MX scale is an e8m0 byte per 32 codes (OCP Microscaling Formats 1.0, 5.1), an NVFP4 scale an e4m3 byte per 16, and a
global scale divides or multiplies all of those. Two e2m1 codes share a byte, the first in its low nibble.

A worked example, one row of two inputs: the byte 0xA7 holds 0x7 (6.0) and then 0xA (-1.0); the scale 126 is a half, and
0x30 under a global divisor of 4 is an eighth.

>>> mxfp4(np.array([[0xA7]], np.uint8), np.array([[126]], np.uint8)).tolist()
[[3.0, -0.5]]
>>> nvfp4(np.array([[0xA7]], np.uint8), np.array([[0x30]], np.uint8), divide_by=4.0).tolist()
[[0.75, -0.125]]
>>> mxfp8(np.array([[0x7E, 0xB8]], np.uint8), np.array([[128]], np.uint8)).tolist()
[[896.0, -2.0]]
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from quantplug_testkit.oracles.floats import Codes, decode

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from quantplug_testkit.oracles.canonical import Floats

MX_GROUP, NV_GROUP = 32, 16


def unpack(packed: Codes) -> Codes:
    """Return the codes `[N, 2 P]` of packed bytes `[N, P]`."""
    codes = np.empty((packed.shape[0], 2 * packed.shape[1]), np.uint8)
    for row, place in np.ndindex(packed.shape):
        codes[row, 2 * place], codes[row, 2 * place + 1] = packed[row, place] % 16, packed[row, place] // 16
    return codes


def pack(codes: Codes) -> Codes:
    """Return packed bytes `[N, K / 2]` of codes `[N, K]` below 16; K is even."""
    return (codes[:, 0::2] + 16 * codes[:, 1::2].astype(np.int64)).astype(np.uint8)


def mxfp8(codes: Codes, scales: Codes) -> Floats:
    """Return float64 `[N, K]`, exact, for bytes of e4m3 codes `[N, K]` and of e8m0 scales `[N, ceil(K / 32)]`."""
    values = decode(codes, "float8_e4m3fn")
    return values * _spread(decode(scales, "float8_e8m0fnu"), codes.shape[1], MX_GROUP)


def mxfp4(packed: Codes, scales: Codes) -> Floats:
    """Return float64 `[N, K]`, exact, for packed codes `[N, K / 2]` and bytes of e8m0 scales `[N, ceil(K / 32)]`."""
    values = decode(unpack(packed), "float4_e2m1fn")
    return values * _spread(decode(scales, "float8_e8m0fnu"), values.shape[1], MX_GROUP)


def nvfp4(packed: Codes, scales: Codes, *, divide_by: float = 1.0, multiply_by: float = 1.0) -> Floats:
    """
    Return float64 `[N, K]` for packed codes `[N, K / 2]` and bytes of e4m3 scales `[N, ceil(K / 16)]`.

    With two roundings to float32, as compressed-tensors has them: first scale and global scale, then that and the code.
    """
    with np.errstate(over="ignore", under="ignore"):
        scale = decode(scales, "float8_e4m3fn").astype(np.float32) / np.float32(divide_by) * np.float32(multiply_by)
        values = decode(unpack(packed), "float4_e2m1fn").astype(np.float32)
        return (values * _spread(scale, values.shape[1], NV_GROUP)).astype(np.float64)


def _spread(scales: NDArray[np.floating[Any]], in_features: int, group: int) -> NDArray[np.floating[Any]]:
    """Return the scale of each input, `[N, K]`."""
    return np.repeat(scales, group, axis=1)[:, :in_features]
