"""
What the stored values of an FP8 layer must satisfy, and errors that name the element which does not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from quantplug.errors import CheckpointError
from quantplug.spec import ElementType
from quantplug_fp8.tiles import tile_maxima

if TYPE_CHECKING:
    from quantplug_fp8.tiles import Tile

_FIX = "The file was damaged or quantized wrongly; download it again or ask its maker."

# The first byte, of those without the sign bit, that is no finite number. The fnuz types have one such byte: 0x80.
_FIRST_SPECIAL = {ElementType.FLOAT8_E4M3FN: 0x7F, ElementType.FLOAT8_E5M2: 0x7C}
_SIGN, _MAGNITUDE = 0x80, 0x7F


def check_codes(codes: torch.Tensor, element: ElementType, name: str) -> None:
    """
    Check that every code is a finite number; a weight of NaN or infinity makes whole outputs so.

    Args:
        codes: `[N, K]` of the element's dtype.
        element: their type.
        name: tensor name.

    Raises:
        CheckpointError: `QP-ST-CODE` with the first element at fault and their number.
    """
    if not codes.numel() or not _has_special(codes, element):
        return
    wrong = ~codes.to(torch.float32).isfinite()
    row, column = wrong.nonzero()[0].tolist()
    raise CheckpointError(
        "QP-ST-CODE",
        f"{name}[{row}, {column}]",
        f"is the byte 0x{int(codes.view(torch.uint8)[row, column]):02X}, {float(codes[row, column])} "
        f"({int(wrong.sum())} of {codes.numel()} codes are not finite)",
        expected="finite codes",
        fix=_FIX,
    )


def _has_special(codes: torch.Tensor, element: ElementType) -> bool:
    """Look for NaN and infinity by their bytes: two passes without a copy, at about the speed of memory."""
    signed = codes.view(torch.int8)
    if element not in _FIRST_SPECIAL:
        return int(signed.min()) == -_SIGN
    first = _FIRST_SPECIAL[element]
    # Seen as signed bytes the positive ones are the largest, seen as unsigned bytes the negative ones.
    return int(signed.max()) >= first or int(codes.view(torch.uint8).max()) >= first | _SIGN


def check_scales(scales: torch.Tensor, codes: torch.Tensor, tile: Tile, name: str) -> None:
    """
    Check that the scales of a weight are finite and positive, or 0 where every code they scale is 0, too.

    A scale is a largest magnitude over a constant, so no writer means a negative one: it is what an engine puts into
    scales that it has not loaded yet. 0 is what some writers store for a tile of zeros; beside other codes it says that
    their values are lost.

    Args:
        scales: `[ceil(N / n), ceil(K / k)]`, any float dtype.
        codes: `[N, K]`.
        tile: rows and inputs of one tile.
        name: tensor name.

    Raises:
        CheckpointError: `QP-ST-SCALE` with the first element at fault.
    """
    values = scales.to(torch.float32)
    _refuse(~(values.isfinite() & (values >= 0)), values, name, "a finite scale, positive")
    zero = values == 0
    if codes.numel() and bool(zero.any()):
        used = tile_maxima(codes.view(torch.uint8) & _MAGNITUDE, tile) != 0
        _refuse(zero & used, values, name, "a positive scale, since the codes that it scales are not all 0")


def check_divisors(scales: torch.Tensor, name: str) -> None:
    """
    Check that scales which values are divided by are finite, above 0, and have a reciprocal in float32.

    Raises:
        CheckpointError: `QP-ST-SCALE` with the first element at fault.
    """
    fine = scales.isfinite() & (scales > 0) & scales.reciprocal().isfinite()
    _refuse(~fine, scales, name, "a finite number above 0 whose reciprocal is one, too, since values are divided by it")


def check_input_scale(scale: torch.Tensor, name: str) -> None:
    """
    Check that the stored scale of x, which x is divided by, is finite and above 0.

    Raises:
        CheckpointError: `QP-ST-SCALE`.
    """
    values = scale.to(torch.float32)
    _refuse(~(values.isfinite() & (values > 0)), values, name, "a finite scale above 0")


def _refuse(wrong: torch.Tensor, values: torch.Tensor, name: str, expected: str) -> None:
    if not bool(wrong.any()):
        return
    places = wrong.nonzero()
    place = places[0].tolist()
    raise CheckpointError(
        "QP-ST-SCALE",
        f"{name}{place or ''}",
        f"is {float(values[tuple(place)])} ({len(places)} of {values.numel()} are wrong)",
        expected=expected,
        fix=_FIX,
    )
