"""
The types that x is quantized to, as a kernel rounds to them: known without torch and without Triton.
"""

from __future__ import annotations

from typing import NamedTuple

from quantplug.spec import ElementType


class Grid(NamedTuple):
    """
    The numbers that a type of codes has.

    Between two powers of two they lie `2^-fraction` of the lower one apart, and below `least` as far as from there on.
    That is also true of integers, whose `least` is beyond all of them.

    Attributes:
        top: the largest code; dynamic scales bring the largest magnitude there.
        bottom: the smallest one.
        fraction: bits behind the leading one.
        least: the smallest normal number.
        exponent: of the largest code, which scales in powers of two go by; 0 where there is no rule for such scales.
    """

    top: float
    bottom: float
    fraction: int
    least: float
    exponent: int


GRIDS = {
    ElementType.FLOAT8_E4M3FN: Grid(448.0, -448.0, 3, 2.0**-6, 8),
    ElementType.FLOAT8_E5M2: Grid(57344.0, -57344.0, 2, 2.0**-14, 15),
    ElementType.FLOAT4_E2M1FN: Grid(6.0, -6.0, 1, 1.0, 2),
    ElementType.INT8: Grid(127.0, -128.0, 7, 128.0, 0),
}
