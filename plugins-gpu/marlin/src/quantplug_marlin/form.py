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

_OPERAND = {False: (7, 127), True: (10, 15)}
"""Whether x is float16, else bfloat16 -> mantissa bits and exponent bias of its dtype."""


class Form(NamedTuple):
    """
    The stored form of a weight, and the dtype of the x that it is multiplied with.

    Attributes:
        element: type of the codes.
        half: whether x is float16; else it is bfloat16.
        scale: dtype of the scales of groups as they are held, "" where there is one group.
        parts: parts of a chunk that have a scale of their own.
        per_group: such parts per group.
        exact: whether codes times scales have few enough digits, and are near enough to 1, for the dtype of x, so that
            `cuda/warpgroup.cu` may multiply them instead of sums.
        rows: whether codes lie row by row (`cuda/rowwise.cuh`), with chunks of 128 inputs, and not as lanes take them.
    """

    element: ElementType
    half: bool
    scale: str
    parts: int
    per_group: int
    exact: bool = False
    rows: bool = False

    @property
    def chunk(self) -> int:
        """Inputs that `cuda/multiply.cu` takes at a time."""
        return 128 if self.rows else 64

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
        shift, exponent = self._float_operand() if self.element.floating else (0, 0)
        mantissa, bias = _OPERAND[self.half]
        fold = fold_of(self.scale, half=self.half) if self.exact else 0
        return {
            "BITS": self.bits,
            "FLOATING": int(self.element.floating),
            "HALF": int(self.half),
            "ZEROS": int(self.zeros),
            "MIDDLE": 0 if self.element.floating else 1 << (self.element.bits - 1),
            "SHIFT": shift,
            "FACTOR_BITS": (exponent + bias) << mantissa if exponent else 0,
            "SUBS": self.parts,
            "PER_GROUP": self.per_group,
            "SCALE_BYTES": SCALE_BYTES.get(self.scale, 2),
            "SCALE_HALF": int(self.scale == "float16"),
            "FOLDED": int(self.exact),
            "FOLD": fold,
            "UNFOLD": exponent - fold,
            **({"ROWS": 1} if self.rows else {}),
        }

    def _float_operand(self) -> tuple[int, int]:
        """
        Return how far a code's bits move right, from below the sign of 16 bits to their places in an operand.

        The exponent that they then stand for is off by the difference of both biases, the second number: that of the
        power of two that corrects it.
        """
        width, mantissa, bias = _EXPONENT[self.element]
        operand_mantissa, operand_bias = _OPERAND[self.half]
        # The lowest mantissa bit of a code stands at bit 15 - width, and has to stand at operand_mantissa - mantissa.
        return (15 - width) - (operand_mantissa - mantissa), operand_bias - bias


def form_of(weight: WeightSpec, dtype: str, slots: Slots) -> Form:
    """Return the form of a weight that is multiplied with x of a dtype, whatever its scales are."""
    scale = HELD_SCALES[weight.scale_dtype] if slots.parts else ""
    return Form(weight.element, dtype == "float16", scale, slots.parts, slots.per_group)


def fold_of(scale: str, *, half: bool) -> int:
    """Return the exponent of the power of two that multiplies scales where they multiply codes, by their held dtype."""
    return 110 if not half else 12 if scale == "bfloat16" else 4


def exact_exponents(element: ElementType, *, half: bool) -> tuple[int, int]:
    """
    Return the lowest and the highest exponent of scales that are powers of two and multiply codes exactly.

    An operand of `cuda/warpgroup.cu` is a code times a scale times 2^(fold - exponent by which its bits are off). It
    has to be normal for bfloat16, a multiple of the smallest number for float16, and no larger than the largest; and so
    has the scale times 2^fold by itself.
    """
    width, mantissa, bias = _EXPONENT[element]
    operand_mantissa, operand_bias = _OPERAND[half]
    off = fold_of("bfloat16", half=half) - (operand_bias - bias)
    smallest_code = 1 - bias - mantissa
    largest_code = (1 << (width - mantissa)) - 1 - bias  # no code has a larger exponent
    lowest = 1 - operand_bias - (operand_mantissa if half else 0)
    highest = min(operand_bias - fold_of("bfloat16", half=half), operand_bias - largest_code - off)
    return lowest - smallest_code - off, highest


_ELEMENTS = tuple(ElementType)
_EXACT = 1 << 7


def encode(form: Form) -> int:
    """Return element, parts, groups and `exact` as one number, the same in every process: an operator's argument."""
    return _ELEMENTS.index(form.element) | form.parts << 4 | form.exact * _EXACT | form.per_group << 8


def decode(number: int, *, half: bool, scale: str) -> Form:
    """Return the form that `encode` has made a number of; the tensors tell the rest."""
    return Form(_ELEMENTS[number & 15], half, scale, number >> 4 & 7, number >> 8, bool(number & _EXACT))


def common(one: int, other: int) -> int:
    """Return the number of a form that both weights have: exact where both are."""
    return one & (other | ~_EXACT)
