"""
What a kernel is compiled for: how codes are stored and decoded, and what scales them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from quantplug.spec import ElementType

if TYPE_CHECKING:
    from quantplug.spec import WeightSpec
    from quantplug_marlin.slots import Slots

HELD_SCALES = {
    "float16": "float16",
    "bfloat16": "bfloat16",
    "float32": "float32",
    "float8_e8m0fnu": "bfloat16",
    "float8_e4m3fn": "float16",
}
"""Scale dtype of a file -> that in which the scales of groups are held: without rounding."""

SCALE_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}

_EXPONENT = {
    # element: bits after the sign that an exponent and a mantissa take, mantissa bits, exponent bias
    ElementType.FLOAT8_E4M3FN: (7, 3, 7),
    ElementType.FLOAT8_E4M3FNUZ: (7, 3, 8),
    ElementType.FLOAT8_E5M2: (7, 2, 15),
    ElementType.FLOAT8_E5M2FNUZ: (7, 2, 16),
    ElementType.FLOAT4_E2M1FN: (3, 1, 1),
}


class Form(NamedTuple):
    """
    The stored form of a weight, and the dtype of the x that it is multiplied with.

    Attributes:
        element: type of the codes.
        half: whether x is float16; else it is bfloat16.
        scale: dtype of the scales of groups as they are held, "" where there is one group.
        parts: parts of a chunk that have a scale of their own.
        per_group: such parts per group.
    """

    element: ElementType
    half: bool
    scale: str
    parts: int
    per_group: int

    @property
    def bits(self) -> int:
        """Width of a stored code: narrow integers take four bits."""
        return 4 if self.element.bits <= 4 else 8

    @property
    def zeros(self) -> bool:
        """Whether there are zero points."""
        return not self.element.signed

    def definitions(self) -> dict[str, int]:
        """Return what the sources in `cuda/` are told of it."""
        shift, factor = self._float_operand() if self.element.floating else (0, 0)
        return {
            "BITS": self.bits,
            "FLOATING": int(self.element.floating),
            "HALF": int(self.half),
            "ZEROS": int(self.zeros),
            "MIDDLE": 0 if self.element.floating else 1 << (self.element.bits - 1),
            "SHIFT": shift,
            "FACTOR_BITS": factor,
            "SUBS": self.parts,
            "PER_GROUP": self.per_group,
            "SCALE_BYTES": SCALE_BYTES.get(self.scale, 2),
            "SCALE_HALF": int(self.scale == "float16"),
        }

    def _float_operand(self) -> tuple[int, int]:
        """
        Return how far a code's bits move right, from below the sign of 16 bits to their places in an operand.

        The exponent that they then stand for is off by the difference of both biases; the second number is the power
        of two that corrects it, in the bits of the operand's type, or 0 for one.
        """
        width, mantissa, bias = _EXPONENT[self.element]
        operand_mantissa, operand_bias = (10, 15) if self.half else (7, 127)
        # The lowest mantissa bit of a code stands at bit 15 - width, and has to stand at operand_mantissa - mantissa.
        shift = (15 - width) - (operand_mantissa - mantissa)
        exponent = operand_bias - bias
        return shift, 0 if exponent == 0 else (exponent + operand_bias) << operand_mantissa


def form_of(weight: WeightSpec, dtype: str, slots: Slots) -> Form:
    """Return the form of a weight that is multiplied with x of a dtype."""
    scale = HELD_SCALES[weight.scale_dtype] if slots.parts else ""
    return Form(weight.element, dtype == "float16", scale, slots.parts, slots.per_group)


_ELEMENTS = tuple(ElementType)


def encode(form: Form) -> int:
    """Return element, parts and groups of a form as one number, the same in every process: an operator's argument."""
    return _ELEMENTS.index(form.element) | form.parts << 4 | form.per_group << 8


def decode(number: int, *, half: bool, scale: str) -> Form:
    """Return the form that `encode` has made a number of; the tensors tell the rest."""
    return Form(_ELEMENTS[number & 15], half, scale, number >> 4 & 15, number >> 8)
