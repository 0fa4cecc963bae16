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
    Check that the scales of a weight are finite; 0 and negative ones have a plain meaning.

    Raises:
        CheckpointError: `QP-ST-SCALE` with the first element at fault.
    """
    _first(~scales.isfinite(), scales, "QP-ST-SCALE", name, "finite scales")


def check_input_scale(scale: torch.Tensor, name: str) -> None:
    """
    Check that the stored scale of x, which x is divided by, is finite and above 0.

    Raises:
        CheckpointError: `QP-ST-SCALE`.
    """
    _first(~(scale.isfinite() & (scale > 0)), scale, "QP-ST-SCALE", name, "a finite number above 0")


def check_range(values: torch.Tensor, bits: int, code: str, name: str) -> None:
    """
    Check that values int8 fit into fewer bits: every 8-bit value is allowed, else `-2^(bits-1) … 2^(bits-1) - 1`.

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


def _first(wrong: torch.Tensor, values: torch.Tensor, code: str, name: str, expected: str) -> None:
    if not bool(wrong.any()):
        return
    places = wrong.nonzero()
    place = places[0].tolist()
    value = values[tuple(place)].item()
    raise CheckpointError(
        code, f"{name}{place or ''}", f"is {value} ({len(places)} of {values.numel()} are wrong)",
        expected=expected, fix=_FIX,
    )  # fmt: skip
