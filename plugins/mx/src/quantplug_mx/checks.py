"""
What the stored values of a layer must satisfy, and errors that name the element which does not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from quantplug.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from quantplug.spec import ParamSpec

_NAN = 0x7F
"""An e4m3fn byte without its sign bit that is NaN."""
_SIGN = 0x80
_E8M0_NAN = 0xFF
_MAGNITUDE = 7
"""The bits of an e2m1 code without its sign."""
_LARGEST = torch.finfo(torch.float32).max
_FIX = "The file was damaged or quantized wrongly; download it again or ask its maker."


def check_dtypes(tensors: Mapping[str, torch.Tensor], specs: Iterable[ParamSpec], where: str) -> None:
    """Check the dtype of every tensor that is there; raises `CheckpointError` (`QP-ST-DTYPE`)."""
    for spec in specs:
        if spec.suffix in tensors:
            dtype = str(tensors[spec.suffix].dtype).removeprefix("torch.")
            if dtype not in spec.dtypes:
                raise CheckpointError(
                    "QP-ST-DTYPE", f"{where}.{spec.suffix}", f"dtype {dtype}", expected=" or ".join(spec.dtypes)
                )


def check_e4m3_codes(codes: torch.Tensor, name: str) -> None:
    """
    Check that no code is NaN; one of them would make a whole output so.

    Args:
        codes: float8_e4m3fn `[N, K]`.
        name: of the tensor.

    Raises:
        CheckpointError: `QP-ST-CODE`.
    """
    octets = codes.view(torch.uint8)
    # Both NaNs are the largest bytes of their sign, with a sign and without: no copy is needed to find one.
    if octets.numel() and (int(octets.view(torch.int8).max()) == _NAN or int(octets.max()) == _NAN | _SIGN):
        _refuse("QP-ST-CODE", octets & _NAN == _NAN, codes, name, "codes that are numbers")


def check_e8m0_scales(scales: torch.Tensor, name: str) -> None:
    """
    Check that no scale is NaN; every other byte is a power of two.

    Args:
        scales: float8_e8m0fnu `[N, G]`.
        name: of the tensor.

    Raises:
        CheckpointError: `QP-ST-SCALE`.
    """
    octets = scales.view(torch.uint8)
    if octets.numel() and int(octets.max()) == _E8M0_NAN:
        _refuse("QP-ST-SCALE", octets == _E8M0_NAN, scales, name, "a byte from 0 (2^-127) to 254 (2^127)")


def check_e4m3_scales(scales: torch.Tensor, codes: torch.Tensor, group: int, name: str) -> None:
    """
    Check that scales are numbers without a sign, and 0 only where every code they scale is 0, too.

    Args:
        scales: float8_e4m3fn `[N, G]`.
        codes: uint8 `[N, K]`, one e2m1 code per byte.
        group: inputs per scale.
        name: of the tensor of scales.

    Raises:
        CheckpointError: `QP-ST-SCALE`.
    """
    octets = scales.view(torch.uint8)
    if not octets.numel():
        return
    if int(octets.max()) >= _NAN:
        _refuse("QP-ST-SCALE", octets >= _NAN, scales, name, "a number without a sign")
    if int(octets.min()) == 0:
        used = (codes & _MAGNITUDE) != 0
        used = torch.nn.functional.pad(used, (0, octets.shape[1] * group - used.shape[1]))
        used = used.view(*octets.shape, group).any(-1)
        _refuse("QP-ST-SCALE", (octets == 0) & used, scales, name, "above 0, since the codes it scales are not all 0")


def check_single(value: torch.Tensor, name: str) -> None:
    """Check that a number a whole layer shares is finite and above 0; raises `CheckpointError` (`QP-ST-SCALE`)."""
    _refuse("QP-ST-SCALE", ~(value.isfinite() & (value > 0)), value, name, "a finite number above 0")


def check_range(scales: torch.Tensor, factor: torch.Tensor, name: str) -> None:
    """
    Check that no scale times the factor of all scales is beyond float32, where 0 times it would be NaN.

    Args:
        scales: float8_e4m3fn `[N, G]`, numbers.
        factor: of all scales.
        name: of the tensor that holds it.

    Raises:
        CheckpointError: `QP-ST-SCALE`.
    """
    largest = float(scales.to(torch.float32).max()) if scales.numel() else 0.0
    if largest * float(factor) > _LARGEST:
        raise CheckpointError(
            "QP-ST-SCALE",
            name,
            f"makes the largest scale, {largest}, as large as {largest * float(factor):.3g}",
            expected=f"scales of at most {_LARGEST:.3g}",
            fix=_FIX,
        )


def _refuse(code: str, wrong: torch.Tensor, values: torch.Tensor, name: str, expected: str) -> None:
    """Raise an error about the first element that is wrong, if any is."""
    if not bool(wrong.any()):
        return
    places = wrong.nonzero()
    place = places[0].tolist()
    value = values[tuple(place)]
    byte = f"the byte 0x{int(value.view(torch.uint8)):02X}, " if value.element_size() == 1 else ""
    raise CheckpointError(
        code,
        f"{name}{place or ''}",
        f"is {byte}{float(value)} ({len(places)} of {wrong.numel()} are wrong)",
        expected=expected,
        fix=_FIX,
    )
