"""
The way back from what the kernel reads, by ordinary torch operators.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from quantplug.spec import ElementType, PerTensor
from quantplug.weight import Weight
from quantplug_triton.fit import field_bits

if TYPE_CHECKING:
    from collections.abc import Sequence

    from quantplug.weight import Prepared


def unprepare(prepared: Prepared) -> tuple[Weight, ...]:
    """
    Return the canonical segments bit by bit: codes are held as they are, scales without rounding.

    Raises:
        NotImplementedError: a float64 scale or factor was rounded to float32 on the way in.
    """
    if prepared.meta["rounded"]:
        raise NotImplementedError("kernel triton.wna16 holds float64 scales in float32: there is no exact way back")
    return canonical(prepared)


def canonical(prepared: Prepared) -> tuple[Weight, ...]:
    """Return the canonical segments as they are held."""
    return canonical_parts(prepared, [_codes(prepared, number) for number in range(prepared.meta["parts"])])


def canonical_parts(prepared: Prepared, codes_of: Sequence[torch.Tensor]) -> tuple[Weight, ...]:
    """Return the canonical segments, given the codes `[N, K]` of each part."""
    segments = list(prepared.problem.segments)
    weights: list[Weight] = []
    for number, codes in enumerate(codes_of):
        rows, spec = prepared.meta[f"rows.{number}"], segments[len(weights)].weight
        tensors = {name: prepared.tensors.get(f"{name}.{number}") for name in ("scales", "zeros", "columns", "factor")}
        held, stored = _present(tensors["scales"]).t(), getattr(torch, spec.scale_dtype)
        scales = held.view(stored) if held.dtype == torch.uint8 else held.to(stored)
        zeros, columns, factor = tensors["zeros"], tensors["columns"], tensors["factor"]
        row = 0
        while row < rows:
            size = segments[len(weights)].out_features
            shared = slice(row, row + size)
            if prepared.meta[f"rows_per_scale.{number}"] > 1 or size == rows:
                shared = slice(None)
            elif isinstance(spec.granularity, PerTensor):
                shared = slice(row, row + 1)
            weights.append(
                Weight(
                    codes[row : row + size],
                    scales[shared],
                    spec,
                    None if zeros is None else zeros.t()[shared],
                    _g_idx(prepared, number, columns) if spec.act_order else None,
                    None if factor is None else factor.reshape(()),
                )
            )
            row += size
    return tuple(weights)


def _present(tensor: torch.Tensor | None) -> torch.Tensor:
    if tensor is None:
        raise TypeError("a prepared weight without scales")
    return tensor


def _codes(prepared: Prepared, number: int) -> torch.Tensor:
    """Return the codes `[N, K]` of a part, in the order of its inputs and in their own dtype."""
    return unpack_codes(
        prepared.tensors[f"codes.{number}"],
        prepared.tensors.get(f"columns.{number}"),
        prepared.problem.segments[0].weight.element,
        prepared.meta[f"chunk.{number}"],
        prepared.meta[f"rows.{number}"],
        prepared.problem.in_features,
    )


def _g_idx(prepared: Prepared, number: int, columns: torch.Tensor | None) -> torch.Tensor:
    width = prepared.meta[f"chunk.{number}"] * prepared.meta[f"per_group.{number}"]
    return unpack_groups(columns, width, prepared.problem.in_features)


def unpack_codes(
    held: torch.Tensor, columns: torch.Tensor | None, element: ElementType, chunk: int, rows: int, inputs: int
) -> torch.Tensor:
    """Return the codes `[rows, inputs]` that are held as `[R / 64, S / F, 64]`, in their own dtype."""
    bits = field_bits(element)
    packed = held.transpose(0, 1).reshape(-1, chunk, held.shape[0] * held.shape[2])
    fields = torch.stack([(packed >> shift) & ((1 << bits) - 1) for shift in range(0, 8, bits)], dim=1)
    slots = fields.reshape(-1, packed.shape[2])[:, :rows]
    if columns is None:
        codes = slots[:inputs]
    else:
        taken = columns >= 0
        codes = torch.empty(inputs, slots.shape[1], dtype=torch.uint8, device=held.device)
        codes[columns[taken].to(torch.int64)] = slots[taken]
    return as_codes(codes.t(), element)


def as_codes(codes: torch.Tensor, element: ElementType) -> torch.Tensor:
    """Return codes in their own dtype, of bytes of which signed integers have their middle added."""
    if element.floating:
        fourbit = element is ElementType.FLOAT4_E2M1FN
        return codes if fourbit else codes.contiguous().view(getattr(torch, element.value))
    if element.signed:
        return (codes - (1 << (element.bits - 1))).view(torch.int8)
    return codes


def unpack_groups(columns: torch.Tensor | None, width: int, inputs: int) -> torch.Tensor:
    """Return int32 `[inputs]`, the group of each input, for groups that are filled up to `width` slots."""
    if columns is None:
        return torch.arange(inputs, dtype=torch.int32) // width
    taken = columns >= 0
    g_idx = torch.empty(inputs, dtype=torch.int32, device=columns.device)
    places = torch.arange(columns.shape[0], device=columns.device) // width
    g_idx[columns[taken].to(torch.int64)] = places[taken].to(torch.int32)
    return g_idx
