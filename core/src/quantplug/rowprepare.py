"""
From canonical weights to the layout that `rowlayout.py` describes, and back.
"""

from __future__ import annotations

from itertools import accumulate
from typing import TYPE_CHECKING

import torch

from quantplug.rowlayout import BLOCK, LAYOUT_ID, fill, mode_of, parts, width
from quantplug.spec import PerTensor
from quantplug.weight import Prepared, Weight, stored_scales

if TYPE_CHECKING:
    from collections.abc import Sequence

    from quantplug.spec import LinearProblem
    from quantplug.weight import ActivationParams


def prepare(
    problem: LinearProblem,
    segments: Sequence[Weight],
    activation: Sequence[ActivationParams | None],
    device: torch.device,
    out: Prepared | None,
) -> Prepared:
    """
    Return the tensors of the layout for a layer whose segments share one contract; `out` is overwritten in place.

    Raises:
        ValueError: a stored scale of x is missing, or `out` has other parts.
    """
    stored = stored_scales(problem, activation)
    layout = parts(problem.segments, together=len(set(stored)) <= 1)
    tensors: dict[str, torch.Tensor] = {}
    meta = {"parts": len(layout), "rounded": int(any(w.scales.dtype == torch.float64 for w in segments))}
    for number, (end, count) in enumerate(zip(accumulate(layout), layout, strict=True)):
        part = segments[end - count : end]
        meta[f"rows.{number}"] = sum(weight.out_features for weight in part)
        tensors[f"codes.{number}"] = codes = _codes(part, width(problem), device)
        tensors[f"scales.{number}"] = _scales(problem, part, *codes.shape).to(device)
        if stored:
            tensors[f"x_scale.{number}"] = torch.tensor([stored[end - count]], dtype=torch.float32, device=device)
    if mode_of(problem) == "row":
        tensors["one"] = torch.ones(1, device=device)
    return Prepared(LAYOUT_ID, problem, tensors, meta).into(out)


def _codes(part: Sequence[Weight], inputs: int, device: torch.device) -> torch.Tensor:
    """Return the codes of some segments below each other, `[R, S]`."""
    rows, dtype = sum(weight.out_features for weight in part), part[0].codes.dtype
    shape = (fill(rows), inputs)
    # Not every operator knows 8-bit floats on every device.
    whole = shape == (rows, part[0].in_features)
    octets = (torch.empty if whole else torch.zeros)(shape, dtype=torch.uint8, device=device)
    row = 0
    for weight in part:
        octets[row : row + weight.out_features, : weight.in_features] = weight.codes.view(torch.uint8).to(device)
        row += weight.out_features
    return octets.view(dtype)


def _scales(problem: LinearProblem, part: Sequence[Weight], rows: int, inputs: int) -> torch.Tensor:
    mode, scales = mode_of(problem), [weight.scales.to(torch.float32) for weight in part]
    if mode == "block":
        held = torch.zeros(-(-rows // BLOCK), inputs // BLOCK)
        joined = torch.cat(scales)
        held[: joined.shape[0], : joined.shape[1]] = joined
        return held.t()
    if len(part) == 1 and isinstance(part[0].spec.granularity, PerTensor):
        return scales[0].reshape(1, 1)
    spread = [scale.expand(weight.out_features, 1) for scale, weight in zip(scales, part, strict=True)]
    return torch.nn.functional.pad(torch.cat(spread).t(), (0, rows - sum(map(len, spread)))).contiguous()


def unprepare(prepared: Prepared) -> tuple[Weight, ...]:
    """
    Return the canonical segments bit by bit.

    Raises:
        NotImplementedError: a float64 scale was rounded to float32 on the way in.
    """
    if prepared.meta["rounded"]:
        raise NotImplementedError(f"the layout {LAYOUT_ID} holds float64 scales in float32: there is no exact way back")
    return canonical(prepared)


def dequantize(prepared: Prepared, dtype: torch.dtype) -> torch.Tensor:
    """Return the values `[N, K]`, computed in float32 and rounded once."""
    return torch.cat([weight.dequantize(dtype) for weight in canonical(prepared)])


def canonical(prepared: Prepared) -> tuple[Weight, ...]:
    """Return the canonical segments as they are held."""
    problem = prepared.problem
    mode, segments = mode_of(problem), iter(problem.segments)
    weights: list[Weight] = []
    for number in range(prepared.meta["parts"]):
        codes, scales = prepared.tensors[f"codes.{number}"], prepared.tensors[f"scales.{number}"]
        row, end = 0, prepared.meta[f"rows.{number}"]
        while row < end:
            segment = next(segments)
            rows, spec = slice(row, row + segment.out_features), segment.weight
            row = rows.stop
            if mode == "block":
                blocks = -(-segment.out_features // BLOCK)
                groups = -(-problem.in_features // BLOCK)
                shared = scales.t()[rows.start // BLOCK : rows.start // BLOCK + blocks, :groups]
            elif isinstance(spec.granularity, PerTensor):
                first = 0 if scales.shape[1] == 1 else rows.start
                shared = scales[:, first : first + 1]
            else:
                shared = scales[:, rows].t()
            held = shared.to(getattr(torch, spec.scale_dtype))
            weights.append(Weight(codes[rows, : problem.in_features], held, spec))
    return tuple(weights)
