"""
How a weight is described to humming: known without a GPU, without humming and without torch.
"""

from __future__ import annotations

from math import lcm
from typing import TYPE_CHECKING, NamedTuple

from quantplug.spec import PerBlock, PerGroup, PerTensor

if TYPE_CHECKING:
    from quantplug.spec import LinearProblem

POWERS = "float8_e8m0fnu"

ALIGNED = 8
"""What humming fills up by itself is a multiple of this; the rest of x and y is cut off here."""

_ROWS = 128
"""N is filled up to a multiple of this: humming's own choice of tiles has an assertion about it."""

_INPUTS = 128
"""K is filled up to a multiple of this and of a group."""

PROMOTED = 128
"""
Inputs that share a scale of x, as far as humming is told: where a scale ends, it moves sums to float32. One scale per
token is said for each of these again.
"""


class Form(NamedTuple):
    """
    What humming has to know about a weight, in whole numbers: an operator of torch can be given these.

    Attributes:
        outputs: N.
        inputs: K.
        bits: width of a code.
        floating: whether codes are floating-point numbers.
        group: inputs that share a scale; 0 for one scale per row or for the whole weight.
        powers: whether scales are float8_e8m0fnu.
        single: whether one float32 scale multiplies the sums.
        zeros: whether there are zero points.
        float8: whether x is multiplied in float8_e4m3fn, by scales in float32, rather than in bfloat16.
        block: rows that share a scale with the inputs of their group, with x in float8_e4m3fn only; else 0.
        promoted: whether sums of products in float8_e4m3fn move to float32 every `PROMOTED` inputs, which is for a call
            to say; where scales are those of blocks, they do.
    """

    outputs: int
    inputs: int
    bits: int
    floating: int
    group: int
    powers: int
    single: int
    zeros: int
    float8: int = 0
    block: int = 0
    promoted: int = 0

    @property
    def filled(self) -> tuple[int, int]:
        """N and K as they are held, filled up to what humming takes."""
        inputs = lcm(_INPUTS, self.group or 1)
        return -(-self.outputs // _ROWS) * _ROWS, -(-self.inputs // inputs) * inputs


def form_of(problem: LinearProblem, *, float8: bool = False) -> Form:
    """Return the form of a layer whose segments share one contract, for x in bfloat16 or in float8_e4m3fn."""
    weight = problem.segments[0].weight
    match weight.granularity:
        case PerGroup(size=group) | PerBlock(k=group):
            pass
        case _:
            group = 0
    return Form(
        problem.out_features,
        problem.in_features,
        weight.element.bits,
        int(weight.element.floating),
        group,
        int(weight.scale_dtype == POWERS),
        int(isinstance(weight.granularity, PerTensor) and len(problem.segments) == 1),
        int(weight.zero_points),
        int(float8),
        weight.granularity.n if float8 and isinstance(weight.granularity, PerBlock) else 0,
    )
