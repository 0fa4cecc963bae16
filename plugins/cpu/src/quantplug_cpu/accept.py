"""
What the packed layout costs: bytes, microseconds, and the words for them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from quantplug.kernel import Accepted, Cost, Rejected, Verdict
from quantplug.spec import PerGroup
from quantplug_cpu.fit import FAST_DTYPE, PACKED_SCALES, packed_casts
from quantplug_cpu.slots import arrange, filled, group_sizes, stays_in_order

if TYPE_CHECKING:
    from quantplug.spec import LinearProblem
    from quantplug_cpu.slots import Slots


@dataclass(frozen=True, slots=True)
class Rates:
    """
    What was measured, see benchmarks/README.md.

    Attributes:
        call_us: of one call, whatever the size.
        weight_us: per weight and call.
        product_us: per weight and row.
    """

    call_us: float
    weight_us: float
    product_us: float

    def cost(self, weights: int, calls: int = 1) -> Cost:
        """Return the cost of a layer with that many weights, multiplied in so many calls."""
        return Cost(self.call_us * calls + weights * self.weight_us, weights * self.product_us)


# Per nibble plane, on two cores with AVX-512 and BF16, weights in memory.
_OPERATOR = Rates(6.0, 2.7e-5, 1.05e-5)
TILES = Rates(60.0, 2.5e-4, 1.0e-5)

# The tiles that take over from the operator for many rows; the product itself does not pay for planes.
_MANY = Rates(60.0, 6.0e-4, 5.5e-6)


def packed_verdict(problem: LinearProblem, planes: int, least_group: int = 16) -> Verdict:
    """
    Return what the packed layout costs for a problem of one contract, in nibbles or (planes 2) in two halves.

    Args:
        problem: what is to run.
        planes: nibbles per code.
        least_group: inputs per group from which on it pays, those that are filled up to 32 included.
    """
    weight, k = problem.segments[0].weight, problem.in_features
    slots = arrange(group_sizes(weight.granularity, k))
    if isinstance(weight.granularity, PerGroup) and slots.count > 32 // least_group * k + 32:
        return Rejected(
            "granularity",
            f"groups of {weight.granularity.size} inputs would be filled up to {slots.group} each",
            f"group sizes from {least_group} on are taken; cpu.dense takes any",
        )
    fast = problem.dtype == FAST_DTYPE
    parts = len(problem.segments) if weight.act_order else 1
    weights = planes * slots.count * problem.out_features
    tiles = _MANY if fast else TILES
    many = Cost(tiles.call_us * parts + weights * tiles.weight_us, weights // planes * tiles.product_us)
    notes = [f"empty slots: {k} inputs are laid out as {slots.count}"] if slots.count != k else []
    if weight.act_order:
        notes.append("x is permuted once per call")
    if planes == 2:
        codes = "twice the floating-point codes" if weight.element.floating else "8-bit codes"
        notes.append(f"{codes} are multiplied as two 4-bit halves")
    if not fast:
        notes.append(f"dequantizes tiles to float32 at every call; {FAST_DTYPE} has an operator of its own")
    return Accepted(
        replace(_OPERATOR.cost(weights, parts), many=many) if fast else many,
        casts=packed_casts(weight, bias=problem.bias) if fast else (),
        extra_bytes=max(0, _held_bytes(problem, planes, slots) - problem.stored_bytes),
        notes=tuple(notes),
    )


def _held_bytes(problem: LinearProblem, planes: int, slots: Slots) -> int:
    """Return the bytes of the packed form; segments with act-order count as if each had an order of its own."""
    weight, k = problem.segments[0].weight, problem.in_features
    sizes = [segment.out_features for segment in problem.segments]
    parts = sizes if weight.act_order else [sum(sizes)]
    # Scales that no operator takes are held in float32.
    scale = 4 * planes if problem.dtype == FAST_DTYPE else PACKED_SCALES.get(weight.scale_dtype, 4)
    rows = sum(filled(size) for size in parts)
    total = 1 + rows * (planes * slots.count // 2 + slots.groups * (scale + weight.zero_points))
    if weight.act_order:
        total += len(parts) * 4 * k
    if weight.act_order or not stays_in_order(weight.granularity, k, slots):
        total += len(parts) * 4 * planes * slots.count
    return total
