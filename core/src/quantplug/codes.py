"""
What single codes stand for: the values of each element type, and the two spellings of 8-bit floats.
"""

from __future__ import annotations

import torch

from quantplug.spec import ElementType

FLOAT4_E2M1FN_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""Value of each 4-bit code: sign, two exponent bits (bias 1), one mantissa bit. Source: OCP MX 1.0, 5.3.3."""

_FNUZ = {torch.float8_e4m3fn: torch.float8_e4m3fnuz, torch.float8_e5m2: torch.float8_e5m2fnuz}


def code_values(codes: torch.Tensor, element: ElementType) -> torch.Tensor:
    """Return float32, fresh: the value of each code (of an unsigned one: before its zero point is taken away)."""
    if element is ElementType.FLOAT4_E2M1FN:
        # made anew each time: torch.compile warns of functions that remember their results
        table = torch.tensor(FLOAT4_E2M1FN_VALUES, dtype=torch.float32, device=codes.device)
        return table.index_select(0, codes.reshape(-1).to(torch.int32)).view(codes.shape)
    return codes.to(torch.float32, copy=True)


def to_fnuz(codes: torch.Tensor, scales: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Return the same weight with codes in the spelling that has no negative zero and no infinities (AMD CDNA 3).

    Its exponent bias is one more, so that the same byte is half the value and scales are doubled. The byte 0x80 is
    negative zero in one spelling and NaN in the other: it becomes 0. Exact for all finite codes and scales but those
    that overflow when doubled.

    Args:
        codes: float8_e4m3fn or float8_e5m2, any shape.
        scales: any floating dtype but float8_e8m0fnu, any shape.

    Raises:
        ValueError: for another dtype, or codes that are NaN or infinite: those have no such byte.
    """
    if codes.dtype not in _FNUZ:
        raise ValueError(f"codes are {codes.dtype}, not one of {', '.join(map(str, _FNUZ))}")
    if not bool(codes.to(torch.float32).isfinite().all()):
        raise ValueError("codes that are NaN or infinite have no counterpart")
    octets = codes.view(torch.uint8)
    octets = torch.where(octets == 0x80, 0, octets)
    return octets.view(_FNUZ[codes.dtype]), scales * 2
