"""
Zero points and the stored numbers about x: signed in the file, unsigned in canonical form.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from quantplug.weight import ActivationParams
from quantplug_compressed_tensors.checks import check_input_scale, check_unused, check_zeros
from quantplug_compressed_tensors.layout import pack, unpack

if TYPE_CHECKING:
    from collections.abc import Mapping

    from quantplug.spec import ActivationSpec


def raised(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Raise int8 values by half their range, to uint8; a sum of bytes is modulo 256, so it is exact."""
    return values.view(torch.uint8) + (1 << (bits - 1))


def lowered(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Take the half again: the inverse of `raised`."""
    return (values - (1 << (bits - 1))).view(torch.int8)


def read_zeros(stored: torch.Tensor, size: tuple[int, int], bits: int, name: str) -> torch.Tensor:
    """
    Return zero points uint8 of that size, from words packed along the first axis or from one signed byte.

    Raises:
        CheckpointError: `QP-ST-ZEROS`, `QP-ST-PADDING`.
    """
    if stored.dtype == torch.int8:
        check_zeros(stored, bits, name)
        return raised(stored, bits).reshape(size)
    fields = unpack(stored.t(), bits)
    if fields.shape[1] > size[0]:
        check_unused(fields[:, size[0] :], size[0], name)
    return fields[:, : size[0]].t()


def write_zeros(zeros: torch.Tensor, size: tuple[int, ...], bits: int) -> torch.Tensor:
    """Return zero points as a file has them next to scales of that stored size; the inverse of `read_zeros`."""
    if len(size) == 1:
        return lowered(zeros, bits).reshape(size)
    return pack(zeros.t(), bits).t().contiguous()


def read_input(tensors: Mapping[str, torch.Tensor], activation: ActivationSpec, where: str) -> ActivationParams:
    """
    Return the stored scale of x and, for unsigned codes, its zero point.

    Raises:
        CheckpointError: `QP-ST-SCALE`, `QP-ST-ZEROS`.
    """
    check_input_scale(tensors["input_scale"], f"{where}.input_scale")
    scale = tensors["input_scale"].to(torch.float32).reshape(())
    if activation.element.signed:
        return ActivationParams(scale)
    bits, zero = activation.element.bits, tensors["input_zero_point"]
    check_zeros(zero, bits, f"{where}.input_zero_point")
    return ActivationParams(scale, raised(zero, bits).reshape(()))


def write_input(known: ActivationParams, activation: ActivationSpec, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Return `input_scale`, in `dtype` where that holds it, else float32, and `input_zero_point` if there is one."""
    stored = {}
    if known.scale is not None:
        scale = known.scale.to(dtype)
        exact = torch.equal(scale.to(torch.float32), known.scale)
        stored["input_scale"] = (scale if exact else known.scale).reshape(1)
    if known.zero is not None:
        stored["input_zero_point"] = lowered(known.zero, activation.element.bits).reshape(1)
    return stored
