"""
From experts' canonical weights to the layout that `expertrows.py` describes, and back.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from quantplug.expertrows import LAYOUT_ID, turns
from quantplug.expertweights import ExpertWeights, PreparedExperts
from quantplug.rowlayout import fill
from quantplug.spec import PerTensor
from quantplug.weight import Weight

if TYPE_CHECKING:
    from collections.abc import Iterable

    from quantplug.moe import MoEProblem
    from quantplug.spec import WeightSpec
    from quantplug.weight import ActivationParams


def prepare_experts(
    problem: MoEProblem,
    experts: Iterable[ExpertWeights],
    device: torch.device,
    out: PreparedExperts | None,
) -> PreparedExperts:
    """
    Return the tensors of the layout; `out` is overwritten in place.

    Raises:
        ValueError: a stored scale of x is missing.
    """
    made = _empty(problem, device) if out is None else out
    tensors, between, rounded = made.tensors, fill(problem.intermediate), False
    for number, expert in enumerate(experts):
        rounded |= any(weight.scales.dtype == torch.float64 for weight in (*expert.w13, expert.w2))
        for part, weight in enumerate(expert.w13):
            group, row = (number, part * between) if turns(problem) == 1 else (part * problem.experts + number, 0)
            _put(tensors["w13.codes"][group], tensors["w13.scales"][group], row, weight)
        _put(tensors["w2.codes"][number], tensors["w2.scales"][number], 0, expert.w2)
        if expert.b2 is not None:
            tensors["b13"][number].copy_(torch.cat(expert.b13))
            tensors["b2"][number].copy_(expert.b2)
        if "w2.x_scales" in tensors:
            for part, stored in enumerate(expert.a13):
                tensors["w13.x_scales"][part, number] = _scale(stored, f"w13 of expert {number}")
            tensors["w2.x_scales"][number] = _scale(expert.a2, f"w2 of expert {number}")
    return PreparedExperts(LAYOUT_ID, problem, tensors, {"rounded": int(rounded)}) if out is None else out


def _empty(problem: MoEProblem, device: torch.device) -> PreparedExperts:
    """Return room for all experts, 0 where it is filled up."""
    count, parts, groups = problem.experts, len(problem.w13), turns(problem)
    hidden, between = fill(problem.hidden), fill(problem.intermediate)
    first = (groups * count, parts // groups * between)
    shapes = {"w13": (*first, hidden), "w2": (count, hidden, between)}
    tensors: dict[str, torch.Tensor] = {}
    for name, shape in shapes.items():
        # Not every operator knows 8-bit floats on every device.
        tensors[f"{name}.codes"] = torch.zeros(shape, dtype=torch.uint8, device=device).view(torch.float8_e4m3fn)
        tensors[f"{name}.scales"] = torch.zeros(shape[:2], device=device)
    if problem.bias:
        dtype = getattr(torch, problem.dtype)
        tensors["b13"] = torch.empty(count, parts * problem.intermediate, dtype=dtype, device=device)
        tensors["b2"] = torch.empty(count, problem.hidden, dtype=dtype, device=device)
    if problem.activation is not None and not problem.activation.dynamic:
        tensors["w13.x_scales"] = torch.empty(parts, count, device=device)
        tensors["w2.x_scales"] = torch.empty(count, device=device)
    return PreparedExperts(LAYOUT_ID, problem, tensors)


def _put(codes: torch.Tensor, scales: torch.Tensor, row: int, weight: Weight) -> None:
    """Write a projection below `row` of an expert's codes `[N, K]` and scales `[N]`."""
    rows = slice(row, row + weight.out_features)
    codes.view(torch.uint8)[rows, : weight.in_features].copy_(weight.codes.view(torch.uint8))
    scales[rows].copy_(weight.scales.to(torch.float32).expand(weight.out_features, 1).squeeze(1))


def _scale(stored: ActivationParams | None, where: str) -> float:
    if stored is None or stored.scale is None:
        raise ValueError(f"a stored scale of x is missing: {where}")
    return float(stored.scale)


def dequantize(prepared: PreparedExperts, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return one expert's values in float32, those of gate above those of up `[P I, H]`, and those of down `[H, I]`."""
    found = weights_of(prepared, expert)
    return torch.cat([weight.dequantize(torch.float32) for weight in found.w13]), found.w2.dequantize(torch.float32)


def unprepare(prepared: PreparedExperts, expert: int) -> ExpertWeights:
    """
    Return one expert's canonical weights bit by bit.

    Raises:
        NotImplementedError: a float64 scale was rounded to float32 on the way in.
    """
    if prepared.meta["rounded"]:
        raise NotImplementedError(f"the layout {LAYOUT_ID} holds float64 scales in float32: there is no exact way back")
    return weights_of(prepared, expert)


def weights_of(prepared: PreparedExperts, expert: int) -> ExpertWeights:
    """Return one expert's canonical weights as they are held."""
    problem, tensors = prepared.problem, prepared.tensors
    groups, between = turns(problem), fill(problem.intermediate)
    w13: list[Weight] = []
    for part, spec in enumerate(problem.w13):
        group, row = (expert, part * between) if groups == 1 else (part * problem.experts + expert, 0)
        codes, scales = tensors["w13.codes"][group], tensors["w13.scales"][group]
        rows = slice(row, row + problem.intermediate)
        w13.append(_taken(codes[rows, : problem.hidden], scales[rows], spec))
    codes, scales = tensors["w2.codes"][expert], tensors["w2.scales"][expert]
    rows = slice(0, problem.hidden)
    return ExpertWeights(tuple(w13), _taken(codes[rows, : problem.intermediate], scales[rows], problem.w2))


def _taken(codes: torch.Tensor, scales: torch.Tensor, spec: WeightSpec) -> Weight:
    shared = scales[:1] if isinstance(spec.granularity, PerTensor) else scales
    return Weight(codes, shared.to(getattr(torch, spec.scale_dtype))[:, None], spec)
