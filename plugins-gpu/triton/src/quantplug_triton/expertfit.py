"""
Which mixtures of experts the kernel takes, what it refuses, and what it costs: known without a GPU and without Triton.
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

from quantplug.expertlimits import refuse_mixture
from quantplug.kernel import Accepted, Cost, Rejected, Verdict
from quantplug.spec import scale_shape
from quantplug_triton.fit import LAUNCH_US, TILE_ROWS, field_bits, is_moved, scale_bytes, verdict
from quantplug_triton.slots import arrange, group_sizes

if TYPE_CHECKING:
    from quantplug.moe import MoEProblem
    from quantplug.platform import Platform

_CALL_US = 4 * LAUNCH_US
"""Routing, two products, and adding up."""


def experts_verdict(problem: MoEProblem, platform: Platform) -> Verdict:
    """Return whether the kernel runs a mixture of experts on a platform, and at what cost."""
    refusal = refuse_mixture(problem)
    if refusal is not None:
        return refusal
    answers: list[Accepted] = []
    for where, projection in zip(("gate and up", "down"), (problem.first, problem.second), strict=True):
        answer = verdict(projection, platform)
        if isinstance(answer, Rejected):
            fix = "loop.triton.wna16 takes them apart" if answer.code == "segments" else answer.fix
            return Rejected(answer.code, f"{where}: {answer.reason}", fix)
        answers.append(answer)
    weights = sum(answer.cost.fixed_us - LAUNCH_US for answer in answers)
    row = problem.top_k * sum(answer.cost.row_us for answer in answers)
    # Few rows take an expert each; of many, every expert has its share, and its weights are read once.
    few = Cost(_CALL_US, problem.top_k * weights + row, Cost(_CALL_US + problem.experts * weights, row))
    return Accepted(
        few,
        extra_bytes=_extra_bytes(problem),
        notes=tuple(dict.fromkeys(note for answer in answers for note in answer.notes)),
    )


def _extra_bytes(problem: MoEProblem) -> int:
    """Return what is held beyond the file's bytes: outputs filled up to tiles, groups to chunks, places of inputs."""
    total = 0
    for product in (problem.first, problem.second):
        weight, inputs = product.segments[0].weight, product.in_features
        bits = field_bits(weight.element)
        slots = arrange(group_sizes(weight.granularity, inputs), 8 // bits)
        # Rows of gate and up take turns in one matrix, unless each has an order of inputs.
        matrices = len(product.segments) if weight.act_order else 1
        rows = -(-product.out_features // matrices // TILE_ROWS) * TILE_ROWS
        held = matrices * (rows * slots.count * bits // 8 + 4 * slots.count * weight.act_order)
        scales = prod(scale_shape(weight.granularity, product.segments[0].out_features, inputs))
        held += len(product.segments) * scales * scale_bytes(weight)
        total += problem.experts * (held - product.stored_bytes)
        if not weight.act_order and is_moved(weight, slots, inputs):
            total += 4 * slots.count
    return max(0, total)
