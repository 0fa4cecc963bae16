"""
What the stored values of a layer must satisfy, and errors that name the element which does not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from quantplug.errors import CheckpointError

if TYPE_CHECKING:
    pass

_FIX = "The file was damaged or quantized wrongly; download it again or ask its maker."


def check_scales(scales: torch.Tensor, name: str) -> None:
    """
    Check that scales are finite and not negative: torchao computes each as a range over a constant.

    Raises:
        CheckpointError: `QP-ST-SCALE` with the first element at fault.
    """
    _first(~(scales.isfinite() & (scales >= 0)), scales, "QP-ST-SCALE", name, "a finite scale, 0 or above")


def check_floats(codes: torch.Tensor, name: str) -> None:
    """
    Check that every 8-bit float is a finite number.

    Raises:
        CheckpointError: `QP-ST-CODE` with the first element at fault.
    """
    values = codes.to(torch.float32)
    _first(~values.isfinite(), values, "QP-ST-CODE", name, "finite codes")


def check_range(values: torch.Tensor, bits: int, code: str, name: str) -> None:
    """
    Check that int8 values fit into fewer bits: every 8-bit value is allowed, else `-2^(bits-1) … 2^(bits-1) - 1`.

    Args:
        values: int8, any shape.
        bits: width they must fit into.
        code: of the error.
        name: tensor name.

    Raises:
        CheckpointError: `code` with the first element at fault.
    """
    if bits == 8 or not values.numel():  # a byte is a byte
        return
    half = 1 << (bits - 1)
    low, high = (int(value) for value in values.aminmax())
    if low < -half or high >= half:
        _first((values < -half) | (values >= half), values, code, name, f"{-half} to {half - 1}, for {bits} bits")


def check_zero(zeros: torch.Tensor, name: str) -> None:
    """
    Check that the zero points of a symmetric weight are what that word says.

    Raises:
        CheckpointError: `QP-ST-ZEROS` with the first element at fault.
    """
    _first(zeros != 0, zeros, "QP-ST-ZEROS", name, "0: the configuration says that codes are symmetric")


def _first(wrong: torch.Tensor, values: torch.Tensor, code: str, name: str, expected: str) -> None:
    if not bool(wrong.any()):
        return
    places = wrong.nonzero()
    place = places[0].tolist()
    raise CheckpointError(
        code, f"{name}{place or ''}", f"is {values[tuple(place)].item()} ({len(places)} of {values.numel()} are wrong)",
        expected=expected, fix=_FIX,
    )  # fmt: skip
