"""
The layout of experts in FP8 that are multiplied with x in FP8: codes row by row, one expert after the other.

Grouped products of 8-bit floats read weights like this: kernels with this `layout_id` share one copy.
`expertrowprepare.py` makes it; here is what fits into it, and how.

For E experts, gate and up of I rows, filled up to R, and H inputs, filled up to S, a scale for every row:

- `w13.codes`: float8_e4m3fn `[E, P R, S]`, gate before up, P of them; where each has a stored scale of x, they are
  groups of their own, those of gate before those of up: `[P E, R, S]`; codes are 0 where they are filled up;
- `w13.scales`: float32 `[E, P R]` or `[P E, R]`;
- `w2.codes` `[E, S, R]`, `w2.scales` `[E, S]`;
- `b13` `[E, P I]`, `b2` `[E, H]`, where there are biases, in the problem's dtype;
- `w13.x_scales` float32 `[P, E]`, `w2.x_scales` `[E]`, the stored scales of what enters either product, where they are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantplug.expertlimits import refuse_mixture
from quantplug.kernel import Rejected
from quantplug.rowlayout import fill, refuse_codes, shared_by
from quantplug.spec import ElementType, PerChannel, PerTensor

if TYPE_CHECKING:
    from quantplug.moe import MoEProblem
    from quantplug.spec import WeightSpec

LAYOUT_ID = "fp8.experts"


def turns(problem: MoEProblem) -> int:
    """
    Return how often x is quantized: once, or for gate and up by themselves, where each has a stored scale of x.

    So often does the first product of an expert count as a group.
    """
    static = problem.activation is not None and not problem.activation.dynamic
    return len(problem.w13) if static else 1


def bytes_held(problem: MoEProblem) -> int:
    """Return the bytes of what `prepare_experts` yields, without biases."""
    parts, hidden, between = len(problem.w13), fill(problem.hidden), fill(problem.intermediate)
    static = problem.activation is not None and not problem.activation.dynamic
    first = parts * between * (hidden + 4)
    second = hidden * (between + 4)
    return problem.experts * (first + second + (4 * (parts + 1) if static else 0))


def refuse(problem: MoEProblem, most_experts: int | None = None) -> Rejected | None:
    """
    Return why a mixture does not fit into the layout, or its file does not permit to multiply it with x in FP8.

    Args:
        problem: what is asked.
        most_experts: that the kernel has room for, None for any number.
    """
    return refuse_mixture(problem, most_experts) or _refuse_weights(problem) or _refuse_activation(problem)


def _refuse_weights(problem: MoEProblem) -> Rejected | None:
    for weight in dict.fromkeys((*problem.w13, problem.w2)):
        refusal = _refuse_weight(weight)
        if refusal is not None:
            return refusal
    return None


def _refuse_weight(weight: WeightSpec) -> Rejected | None:
    refusal = refuse_codes(weight, (ElementType.FLOAT8_E4M3FN,))
    if refusal is None and not isinstance(weight.granularity, PerTensor | PerChannel):
        return Rejected("granularity", f"scales of {shared_by(weight)}", "one scale, or one per row")
    return refusal


def _refuse_activation(problem: MoEProblem) -> Rejected | None:
    x = problem.activation
    if x is None:
        return Rejected("activation", "the file permits none", "a kernel that leaves x as it is")
    shared = (x.granularity, x.dynamic) in (("token", True), ("tensor", False))
    plain = x.scale_dtype == "float32" and not x.global_scale
    if x.element is not ElementType.FLOAT8_E4M3FN or not shared or not plain:
        wanted = "float8_e4m3fn per token, dynamic, or per tensor, static"
        return Rejected("activation", f"x as {x.describe()}", wanted)
    return None
