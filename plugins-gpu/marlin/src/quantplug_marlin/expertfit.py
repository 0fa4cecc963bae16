"""
Which mixtures of experts the kernel takes, which it refuses, and what they cost: known without a GPU.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from quantplug.expertlimits import refuse_mixture
from quantplug.kernel import Accepted, Cast, Cost, Rejected, Verdict
from quantplug.spec import LinearProblem, SegmentSpec
from quantplug_marlin.fit import BYTES_PER_US, CALL_US, verdict
from quantplug_marlin.slots import STEP, arrange_in_order, group_size

if TYPE_CHECKING:
    from collections.abc import Iterator

    from quantplug.moe import MoEProblem
    from quantplug.platform import Platform
    from quantplug.spec import WeightSpec

MOST_EXPERTS = 2048
"""What `cuda/route.cu` has memory for."""

_CALL_US = 15.0
_SLOWER = 1.25
"""How much longer a row's products take than in a linear layer: blocks of rows of one expert are filled up."""


def projections(problem: MoEProblem) -> Iterator[LinearProblem]:
    """Yield gate, up and down, or up and down, as linear layers of one segment."""
    for spec in problem.w13:
        yield LinearProblem(problem.hidden, (SegmentSpec(problem.intermediate, spec),), problem.dtype, problem.bias)
    yield LinearProblem(problem.intermediate, (SegmentSpec(problem.hidden, problem.w2),), problem.dtype, problem.bias)


def experts_verdict(problem: MoEProblem, platform: Platform) -> Verdict:
    """Return whether the kernel runs a mixture of experts on a platform, and at what cost."""
    refusal = refuse_mixture(problem, MOST_EXPERTS)
    if refusal is not None:
        return refusal
    answers = []
    for projection in projections(problem):
        weight = projection.segments[0].weight
        answer = verdict(projection, platform)
        if isinstance(answer, Rejected):
            return answer
        refusal = _refuse_order(weight, projection.in_features)
        if refusal is not None:
            return refusal
        answers.append(answer)
    if len(set(problem.w13)) > 1:
        kinds = " and ".join(spec.describe() for spec in problem.w13)
        return Rejected("segments", f"gate and up differ: {kinds}", "one contract for both")
    one = sum(answer.cost.fixed_us - CALL_US for answer in answers)
    row = problem.top_k * (_SLOWER * sum(answer.cost.row_us for answer in answers) + _moved(problem) / BYTES_PER_US)
    return Accepted(
        # Few rows take an expert each; of many, every expert has its share, and its weights are read once.
        Cost(_CALL_US, problem.top_k * one + row, Cost(_CALL_US + problem.experts * one, row)),
        casts=(Cast("expert", problem.dtype),),
        extra_bytes=problem.experts * sum(answer.extra_bytes for answer in answers),
        notes=tuple(dict.fromkeys(note for answer in answers for note in answer.notes)),
    )


def _moved(problem: MoEProblem) -> int:
    """
    Return the bytes that are read and written for each choice of a row beside weights, all in numbers of two bytes: x
    put in order and read again, what lies between the products, and what an expert gives, which is added up.
    """
    return 10 * problem.hidden + 4 * problem.intermediate


def _refuse_order(weight: WeightSpec, inputs: int) -> Rejected | None:
    """Inputs stay where they are: of the second product they are what the first one writes."""
    if weight.act_order:
        return Rejected(
            "act_order", "act-order: each expert has an order of inputs of its own", "the loop over experts"
        )
    size = group_size(weight.granularity, inputs)
    slots = arrange_in_order(weight.granularity, inputs, apart=weight.global_scale)
    if slots.groups > 1 and slots.width != size:
        return Rejected("granularity", f"groups of {size} inputs are filled up to {slots.width}", f"groups of {STEP}")
    return None


def plain(problem: LinearProblem) -> LinearProblem:
    """Return a linear layer without its bias, as weights are prepared for it."""
    return replace(problem, bias=False)
