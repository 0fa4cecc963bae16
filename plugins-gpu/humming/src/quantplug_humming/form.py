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
    """

    outputs: int
    inputs: int
    bits: int
    floating: int
    group: int
    powers: int
    single: int
    zeros: int

    @property
    def filled(self) -> tuple[int, int]:
        """N and K as they are held, filled up to what humming takes."""
        inputs = lcm(_INPUTS, self.group or 1)
        return -(-self.outputs // _ROWS) * _ROWS, -(-self.inputs // inputs) * inputs


def form_of(problem: LinearProblem) -> Form:
    """Return the form of a layer whose segments share one contract."""
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
    )
