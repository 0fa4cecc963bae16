"""
From canonical weights to what the kernel for a quantized x reads, and back.

Segments that can share one launch become one part, else each becomes a part of its own: those with blocks of their own,
and all of them where stored scales of x differ. The tensors of part i, for N rows and K inputs filled up to S:

- `codes.i`: `[N, S]` in the dtype of the codes, row by row, 0 where filled up; or uint8 `[N, S / 2]` for those of four
  bits, a byte for slot j of a chunk and, in its upper half, slot j of the next; signed integers have 8 added;
- `scales.i`: `[G, P]`, one column per row, or per block of rows, or one for all; float8_e8m0fnu as its uint8;
- `x_scale.i`: float32 `[1]`, the stored scale of x, where there is one.

`rounded` tells whether a scale was float64.
"""

from __future__ import annotations

from itertools import accumulate
from typing import TYPE_CHECKING

import torch

from quantplug.spec import ElementType
from quantplug.weight import Prepared, stored_scales
from quantplug_triton.prepare import held_scales, is_rounded, middle_of, rows_per_scale, shared_scales
from quantplug_triton.unpack import as_codes, canonical_parts
from quantplug_triton.w8a8fit import chunks_of, held_bits, parts

if TYPE_CHECKING:
    from collections.abc import Sequence

    from quantplug.spec import LinearProblem
    from quantplug.weight import ActivationParams, Weight
    from quantplug_triton.w8a8fit import Chunks


def prepare_quantized(
    problem: LinearProblem,
    segments: Sequence[Weight],
    activation: Sequence[ActivationParams | None],
    device: torch.device,
    layout_id: str,
    out: Prepared | None,
) -> Prepared:
    """
    Return the tensors above for a layer whose segments share one contract; `out` is overwritten in place.

    Raises:
        ValueError: a stored scale of x is missing, `out` has other parts, or the problem is none that the kernel takes.
    """
    chunks = chunks_of(problem)
    if chunks is None:
        raise ValueError(f"no chunk of inputs lies within the groups of {problem}")
    stored = stored_scales(problem, activation)
    layout = parts(problem.segments, together=len(set(stored)) <= 1)
    tensors: dict[str, torch.Tensor] = {}
    meta = {
        "parts": len(layout),
        "chunk": chunks.size,
        "per_group": chunks.per_group,
        "rounded": int(any(is_rounded(weight) for weight in segments)),
    }
    for number, (end, count) in enumerate(zip(accumulate(layout), layout, strict=True)):
        part = segments[end - count : end]
        rows = sum(weight.out_features for weight in part)
        tensors[f"codes.{number}"] = _pack(part, chunks).to(device)
        tensors[f"scales.{number}"] = shared_scales([held_scales(weight) for weight in part], part).to(device)
        if stored:
            tensors[f"x_scale.{number}"] = torch.tensor([stored[end - count]], dtype=torch.float32, device=device)
        meta |= {f"rows.{number}": rows, f"rows_per_scale.{number}": rows_per_scale(part, rows)}
    return Prepared(layout_id, problem, tensors, meta).into(out)


def _pack(part: Sequence[Weight], chunks: Chunks) -> torch.Tensor:
    """Return the codes of some segments below each other, as they are held."""
    element, inputs = part[0].spec.element, part[0].in_features
    octets = torch.cat([weight.codes.contiguous().view(torch.uint8) for weight in part])
    octets = torch.nn.functional.pad(octets, (0, chunks.slots(inputs) - inputs))
    if held_bits(element) == 8:
        return octets.view(part[0].codes.dtype)
    fields = (octets + middle_of(element)).view(len(octets), -1, chunks.fields, chunks.size)
    # What is filled up is 0 or the smallest number, which a code of x multiplies that is 0.
    return ((fields[:, :, 0] & 15) | (fields[:, :, 1] << 4)).flatten(1)


def _unpack(held: torch.Tensor, element: ElementType, chunks: Chunks, inputs: int) -> torch.Tensor:
    """Return the codes `[N, K]` in their own dtype."""
    if held_bits(element) == 8:
        return held[:, :inputs]
    octets = held.view(len(held), -1, 1, chunks.size)
    codes = torch.cat([octets & 15, octets >> 4], dim=2).flatten(1)[:, :inputs]
    return as_codes(codes, element)


def unprepare_quantized(prepared: Prepared) -> tuple[Weight, ...]:
    """
    Return the canonical segments bit by bit.

    Raises:
        NotImplementedError: a float64 scale was rounded to float32 on the way in.
    """
    if prepared.meta["rounded"]:
        raise NotImplementedError("kernel triton.w8a8 holds float64 scales in float32: there is no exact way back")
    return canonical_quantized(prepared)


def canonical_quantized(prepared: Prepared) -> tuple[Weight, ...]:
    """Return the canonical segments as they are held."""
    problem = prepared.problem
    chunks, element = chunks_of(problem), problem.segments[0].weight.element
    if chunks is None:
        raise ValueError(f"no chunk of inputs lies within the groups of {problem}")
    codes = [
        _unpack(prepared.tensors[f"codes.{number}"], element, chunks, problem.in_features)
        for number in range(prepared.meta["parts"])
    ]
    return canonical_parts(prepared, codes)
