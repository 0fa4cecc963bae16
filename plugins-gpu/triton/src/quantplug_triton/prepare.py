"""
From canonical weights to what the kernel reads.

Segments that can share one launch become one part, else each becomes a part of its own: those with an order of inputs,
a global scale or blocks of their own. The tensors of part i, for N rows filled up to R (a multiple of 64) and S slots:

- `codes.i`: uint8 `[R / 64, S / F, 64]`, F codes to a byte. Byte row c * chunk + j of a column block holds slot j of
  the F chunks c * F … c * F + F - 1, the first in the lowest bits; signed integers have their middle added;
- `scales.i`: `[G, P]`, one column per row, or per block of rows, or one for all; float8_e8m0fnu as its uint8;
- `zeros.i`: uint8, of the shape of the scales, where there are zero points;
- `columns.i`: int32 `[S]`, the input that each slot takes, -1 for none, where inputs move or groups are filled up;
- `factor.i`: float32 `[1]`, the global scale, where there is one.

`rounded` tells whether a scale or factor was float64.
"""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

import torch

from quantplug.spec import ElementType, PerBlock, PerTensor
from quantplug.weight import Prepared
from quantplug_triton.fit import HELD_SCALES, TILE_ROWS, field_bits, parts
from quantplug_triton.slots import arrange, group_sizes

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from quantplug.spec import LinearProblem, WeightSpec
    from quantplug.weight import Weight
    from quantplug_triton.slots import Slots

KINDS = {
    ElementType.FLOAT8_E4M3FN: 2,
    ElementType.FLOAT8_E5M2: 3,
    ElementType.FLOAT4_E2M1FN: 4,
}
"""How the kernel decodes floating-point codes; 0 is unsigned integers, 1 signed ones."""


def is_rounded(weight: Weight) -> bool:
    """Whether a reciprocal that the canonical form holds in float64 is held in float32 here."""
    return torch.float64 in (weight.scales.dtype, None if weight.global_scale is None else weight.global_scale.dtype)


class Order(NamedTuple):
    """Which input each slot takes (-1: none), and the arrangement."""

    inputs: torch.Tensor
    slots: Slots


def prepare(
    problem: LinearProblem, segments: Sequence[Weight], device: torch.device, layout_id: str, out: Prepared | None
) -> Prepared:
    """Return the tensors above for a layer whose segments share one contract; `out` is overwritten in place."""
    tensors: dict[str, torch.Tensor] = {}
    meta = {"parts": 0, "rounded": int(any(is_rounded(weight) for weight in segments))}
    for number, part in enumerate(_parts(problem, segments)):
        order = order_of(part[0])
        rows = sum(weight.out_features for weight in part)
        for name, tensor in _part(part, order).items():
            tensors[f"{name}.{number}"] = tensor.to(device)
        meta |= {
            "parts": number + 1,
            f"rows.{number}": rows,
            f"chunk.{number}": order.slots.chunk,
            f"per_group.{number}": order.slots.per_group,
            f"slots.{number}": order.slots.count,
            f"rows_per_scale.{number}": rows_per_scale(part, rows),
        }
    return Prepared(layout_id, problem, tensors, meta).into(out)


def _parts(problem: LinearProblem, segments: Sequence[Weight]) -> Iterator[list[Weight]]:
    weights = iter(segments)
    for part in parts(problem):
        yield list(islice(weights, len(part)))


def rows_per_scale(part: Sequence[Weight], rows: int) -> int:
    """Return how many rows of a part share a column of its scales."""
    granularity = part[0].spec.granularity
    if isinstance(granularity, PerTensor) and len(part) == 1:
        return rows
    return granularity.n if isinstance(granularity, PerBlock) else 1


def order_of(weight: Weight, least: int = 0) -> Order:
    """Return where the inputs of a weight go; with act-order, its groups are filled up to at least so many inputs."""
    fields = 8 // field_bits(weight.spec.element)
    index = weight.group_index()
    if weight.g_idx is None:
        slots = arrange(group_sizes(weight.spec.granularity, weight.in_features), fields)
        sorted_inputs = torch.arange(weight.in_features)
    else:
        sizes = torch.bincount(index, minlength=weight.scales.shape[1])
        slots = arrange(sizes.clamp(min=least).tolist(), fields)
        sorted_inputs = torch.argsort(index, stable=True)
    # The place of an input within its group, which begins where the ones before it end.
    groups_of = index[sorted_inputs]
    starts = torch.searchsorted(groups_of, torch.arange(slots.groups))
    place = torch.arange(weight.in_features) - starts[groups_of]
    inputs = torch.full((slots.count,), -1, dtype=torch.int64)
    inputs[groups_of * slots.per_group * slots.chunk + place] = sorted_inputs
    return Order(inputs, slots)


def _part(part: Sequence[Weight], order: Order) -> dict[str, torch.Tensor]:
    spec = part[0].spec
    result = {"codes": pack_codes([weight.codes for weight in part], spec, order)}
    result["scales"] = shared_scales([held_scales(weight) for weight in part], part)
    if spec.zero_points:
        result["zeros"] = shared_scales([weight.zeros for weight in part if weight.zeros is not None], part)
    if not in_order(order, part[0].in_features):
        result["columns"] = order.inputs.to(torch.int32)
    if part[0].global_scale is not None:
        result["factor"] = part[0].global_scale.reshape(1).to(torch.float32)
    return result


def held_scales(weight: Weight) -> torch.Tensor:
    """Return scales in the dtype in which they are held."""
    held: torch.dtype = getattr(torch, HELD_SCALES[weight.spec.scale_dtype])
    return weight.scales.view(held) if held == torch.uint8 else weight.scales.to(held)


def in_order(order: Order, inputs: int) -> bool:
    """Whether every input stays in its place, and empty slots are at the end."""
    expected = torch.arange(order.slots.count)
    expected[inputs:] = -1
    return torch.equal(order.inputs, expected)


def shared_scales(tensors: Sequence[torch.Tensor], part: Sequence[Weight]) -> torch.Tensor:
    """Return scales or zero points as `[G, P]`, contiguous."""
    if isinstance(part[0].spec.granularity, PerTensor) and len(part) > 1:
        tensors = [tensor.expand(weight.out_features, 1) for tensor, weight in zip(tensors, part, strict=True)]
    return torch.cat(list(tensors)).t().contiguous()


def pack_codes(parts_of: Sequence[torch.Tensor], spec: WeightSpec, order: Order) -> torch.Tensor:
    """Return uint8 `[R / 64, S / F, 64]` of codes `[N, K]`, one below the other."""
    slots, bits = order.slots, field_bits(spec.element)
    middle = middle_of(spec.element)
    rows = sum(len(each) for each in parts_of)
    filled = -(-rows // TILE_ROWS) * TILE_ROWS
    codes = torch.zeros(slots.count, filled, dtype=torch.uint8)
    taken = order.inputs >= 0
    row = 0
    for each in parts_of:
        # Adding in uint8 is modulo 256, which turns two's complement into the unsigned code.
        octets = each.view(torch.uint8).t().index_select(0, order.inputs[taken]) + middle
        codes[taken, row : row + len(each)] = octets
        row += len(each)
    fields = codes.view(-1, slots.fields, slots.chunk, filled)
    packed = fields[:, 0].clone()
    for number in range(1, slots.fields):
        packed |= fields[:, number] << (bits * number)
    return packed.view(-1, filled // TILE_ROWS, TILE_ROWS).transpose(0, 1).contiguous()


def middle_of(element: ElementType) -> int:
    """Return what is added to the codes of a signed integer."""
    return 1 << (element.bits - 1) if element.signed and not element.floating else 0


def kind_of(element: ElementType) -> int:
    """Return how the kernel decodes a code."""
    return KINDS.get(element, 1 if element.signed else 0)
