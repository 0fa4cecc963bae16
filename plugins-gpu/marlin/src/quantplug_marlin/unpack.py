"""
The way back from what the kernels read, by ordinary torch operators.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from quantplug.spec import PerBlock, PerTensor
from quantplug.weight import Weight
from quantplug_marlin.prepare import TILE

if TYPE_CHECKING:
    from quantplug.spec import ElementType, SegmentSpec
    from quantplug.weight import Prepared


def unprepare(prepared: Prepared) -> tuple[Weight, ...]:
    """
    Return the canonical segments bit by bit: codes are held as they are, scales without rounding.

    Raises:
        NotImplementedError: a float64 scale or factor was rounded to float32 on the way in.
    """
    if prepared.meta["rounded"]:
        raise NotImplementedError("kernel marlin.wna16 holds float64 scales in float32: there is no exact way back")
    return canonical(prepared)


def canonical(prepared: Prepared) -> tuple[Weight, ...]:
    """Return the canonical segments as they are held."""
    segments = iter(prepared.problem.segments)
    weights: list[Weight] = []
    for number in range(prepared.meta["parts"]):
        rows, count = prepared.meta[f"rows.{number}"], prepared.meta[f"segments.{number}"]
        codes = _codes(prepared, number)
        scales, zeros = (_by_row(prepared.tensors.get(f"{name}.{number}"), rows) for name in ("scales", "zeros"))
        factor = prepared.tensors.get(f"factor.{number}")
        row = 0
        for _ in range(count):
            segment = next(segments)
            of = slice(row, row + segment.out_features)
            weights.append(_weight(prepared, number, segment, codes[of], (scales, zeros, factor), of))
            row = of.stop
    return tuple(weights)


def _weight(
    prepared: Prepared,
    number: int,
    segment: SegmentSpec,
    codes: torch.Tensor,
    held: tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None],
    of: slice,
) -> Weight:
    """Return one segment: rows `of` of what a part holds as scales `[R, G]`, zero points `[R, G]` and factors `[R]`."""
    spec = segment.weight
    scales, zeros, factor = held
    factors = None if factor is None else factor[of]
    match spec.granularity:
        case PerBlock(n=n):
            distinct = slice(None, None, n)
        case PerTensor():
            distinct = slice(0, 1)
        case _:
            distinct = slice(None)
    values = scales[of] if scales is not None else _present(factors).unsqueeze(1)
    return Weight(
        codes,
        values[distinct].to(getattr(torch, spec.scale_dtype)),
        spec,
        None if zeros is None else zeros[of][distinct],
        _g_idx(prepared, number) if spec.act_order else None,
        _present(factors)[0].reshape(()) if spec.global_scale else None,
    )


def _present(tensor: torch.Tensor | None) -> torch.Tensor:
    if tensor is None:
        raise TypeError("a prepared weight without scales")
    return tensor


def _by_row(tiles: torch.Tensor | None, rows: int) -> torch.Tensor | None:
    """Return `[tiles, G, 8, 2]` as `[R, G]`."""
    return None if tiles is None else tiles.permute(0, 3, 2, 1).reshape(-1, tiles.shape[1])[:rows]


def _codes(prepared: Prepared, number: int) -> torch.Tensor:
    """Return the codes `[R, K]` of a part, in the order of its inputs and in their own dtype."""
    element = prepared.problem.segments[0].weight.element
    rows, inputs = prepared.meta[f"rows.{number}"], prepared.problem.in_features
    slots = _unpack(prepared.tensors[f"codes.{number}"], element)[:rows]
    columns = prepared.tensors.get(f"columns.{number}")
    if columns is None:
        octets = slots[:, :inputs].contiguous()
    else:
        taken = columns >= 0
        octets = torch.empty(rows, inputs, dtype=torch.uint8, device=slots.device)
        octets[:, columns[taken].to(torch.int64)] = slots[:, taken]
    if element.floating:
        return octets if element.bits == 4 else octets.view(getattr(torch, element.value))
    if element.bits == 8:
        return octets.view(torch.int8) if element.signed else octets ^ 0x80
    return (octets - (1 << (element.bits - 1))).view(torch.int8) if element.signed else octets


def _unpack(units: torch.Tensor, element: ElementType) -> torch.Tensor:
    """Return the stored codes `[tiles * 16, S]` of units, the inverse of `prepare._pack`."""
    tiles, chunks = units.shape[:2]
    if element.bits <= 4:
        both = units.view(tiles, chunks, 8, 4, 4, 2, 2).permute(0, 2, 1, 4, 6, 3, 5)
        codes = torch.stack([both & 15, both >> 4], dim=1)
    else:
        codes = units.view(tiles, chunks, 2, 8, 4, 2, 2, 2, 2).permute(0, 8, 3, 1, 2, 5, 6, 4, 7)
    return codes.reshape(tiles * TILE, -1)


def _g_idx(prepared: Prepared, number: int) -> torch.Tensor:
    """Return int32 `[K]`, the group of each input."""
    columns, width = prepared.tensors.get(f"columns.{number}"), prepared.meta[f"width.{number}"]
    inputs = prepared.problem.in_features
    if columns is None:
        device = prepared.tensors[f"codes.{number}"].device
        return torch.zeros(inputs, dtype=torch.int32, device=device)
    taken = columns >= 0
    g_idx = torch.empty(inputs, dtype=torch.int32, device=columns.device)
    places = torch.arange(columns.shape[0], device=columns.device) // width
    g_idx[columns[taken].to(torch.int64)] = places[taken].to(torch.int32)
    return g_idx
