"""
From canonical weights to the layout that the kernels read.

Segments of a fused layer follow each other row by row in one part, unless act-order gives them orders of their own. Per
part i, of R outputs, S slots (see `slots.py`) and G groups:

- `codes.i`: uint8 `[ceil(R / 16), S / 64, 128 * bits]`, units of 16 outputs and 64 slots. Lane `4 g + q` of a warp
  finds its codes of a unit 16 bytes at a time (of 8-bit codes 512 bytes apart): those of outputs g and g + 8 and, in
  each step of 16 slots, of slots 2 q, 2 q + 1 and the two that lie eight on, as the matrix instructions take them.
  Integers narrower than four bits take four; signed ones have their middle added; those of eight bits are signed.
- `scales.i`: `[ceil(R / 16), G, 8, 2]`, outputs g and g + 8 side by side, where there are groups or a global scale;
- `zeros.i`: uint8, of the shape of `scales.i`, where there are zero points;
- `factor.i`: float32 `[R]`, what multiplies the whole sum of an output: its only scale, or the global one;
- `columns.i`: int32 `[S]`, the input that each slot takes, -1 for none, where inputs move or groups are filled up.

`rounded` tells whether a scale was float64. `form.i` is a number that `form.py` encodes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from quantplug.errors import LoadError
from quantplug.spec import ElementType, PerBlock, PerTensor
from quantplug.weight import Prepared
from quantplug_marlin.form import HELD_SCALES, common, encode, exact_exponents, form_of
from quantplug_marlin.slots import CHUNK, arrange, arrange_in_order, group_size

if TYPE_CHECKING:
    from collections.abc import Sequence

    from quantplug.spec import LinearProblem
    from quantplug.weight import Weight
    from quantplug_marlin.form import Form
    from quantplug_marlin.slots import Slots

TILE = 16
"""Outputs of a unit."""


class Order(NamedTuple):
    """The arrangement, and which input each slot takes (-1: none); None where slot k takes input k."""

    slots: Slots
    columns: torch.Tensor | None


def prepare(
    problem: LinearProblem, segments: Sequence[Weight], device: torch.device, layout_id: str, out: Prepared | None
) -> Prepared:
    """Return the tensors above for a layer whose segments share one contract; `out` is overwritten in place."""
    tensors: dict[str, torch.Tensor] = {}
    meta = {"rounded": int(any(_is_rounded(weight) for weight in segments))}
    parts = split(segments)
    for number, part in enumerate(parts):
        order = order_of(part[0])
        for name, tensor in _part(part, order, device).items():
            tensors[f"{name}.{number}"] = tensor
        meta |= {
            f"segments.{number}": len(part),
            f"rows.{number}": sum(weight.out_features for weight in part),
            f"width.{number}": order.slots.width,
            f"groups.{number}": order.slots.groups,
            f"form.{number}": encode(_form(part, problem.dtype, order)),
        }
    meta["parts"] = len(parts)
    if out is not None:
        for number in range(len(parts)):
            keep_promise(out.meta[f"form.{number}"], meta[f"form.{number}"])
    return Prepared(layout_id, problem, tensors, meta).into(out)


def keep_promise(held: int, new: int) -> None:
    """
    Raise where weights are to take the place of others whose scales multiply codes exactly, and theirs do not.

    Raises:
        LoadError: QP-LOAD-PREPARE.
    """
    if common(held, new) != held:
        raise LoadError(
            "QP-LOAD-PREPARE",
            "a layer in the layout of marlin",
            "scales are so large or small that codes times scales would be rounded; those that they replace were not",
            fix="load the layer anew instead of in place",
        )


def _form(part: Sequence[Weight], dtype: str, order: Order) -> Form:
    """Return the form of a part: exact where no scale is so large or small that codes times scales would be rounded."""
    form = form_of(part[0].spec, dtype, order.slots)
    if not form.parts or not form.element.floating:
        return form
    scale_dtype = part[0].spec.scale_dtype
    if scale_dtype == "float8_e4m3fn":  # four digits, and FP4 has two
        return form._replace(exact=form.element is ElementType.FLOAT4_E2M1FN)
    if scale_dtype != "float8_e8m0fnu":
        return form
    lowest, highest = exact_exponents(form.element, half=form.half)
    values = [weight.scales.to(torch.float32) for weight in part]
    fits = (bool((value >= 2.0**lowest).all() and (value <= 2.0**highest).all()) for value in values)
    return form._replace(exact=all(fits))


def split(segments: Sequence[Weight]) -> list[list[Weight]]:
    """Return neighbouring segments that assign inputs to groups in the same way, together."""
    parts: list[list[Weight]] = []
    for weight in segments:
        if parts and _same_order(parts[-1][0], weight):
            parts[-1].append(weight)
        else:
            parts.append([weight])
    return parts


def _same_order(one: Weight, other: Weight) -> bool:
    if one.g_idx is None or other.g_idx is None:
        return one.g_idx is other.g_idx
    return torch.equal(one.g_idx, other.g_idx) and one.scales.shape[1] == other.scales.shape[1]


def _is_rounded(weight: Weight) -> bool:
    """Whether a reciprocal that the canonical form holds in float64 is held in float32 here."""
    return torch.float64 in (weight.scales.dtype, None if weight.global_scale is None else weight.global_scale.dtype)


def order_of(weight: Weight) -> Order:
    """Return the arrangement of a weight's inputs."""
    apart = weight.spec.global_scale
    if weight.g_idx is None:
        slots = arrange_in_order(weight.spec.granularity, weight.in_features, apart=apart)
        if slots.width in {0, group_size(weight.spec.granularity, weight.in_features)} or slots.groups == 1:
            return Order(slots, None)
    index = weight.group_index()
    groups = weight.scales.shape[1]
    largest = int(torch.bincount(index, minlength=groups).max())
    slots = arrange(largest, groups, weight.in_features, apart=apart)
    if not slots.width:
        return Order(slots, None)
    sorted_inputs = torch.argsort(index, stable=True)
    # The place of an input within its group, which begins where the ones before it end.
    groups_of = index[sorted_inputs]
    starts = torch.searchsorted(groups_of, torch.arange(groups))
    place = torch.arange(weight.in_features) - starts[groups_of]
    columns = torch.full((slots.count,), -1, dtype=torch.int64)
    columns[groups_of * slots.width + place] = sorted_inputs
    return Order(slots, columns)


def _part(part: Sequence[Weight], order: Order, device: torch.device) -> dict[str, torch.Tensor]:
    spec = part[0].spec
    result = {"codes": _pack(_codes(part, order, device), spec.element)}
    if order.slots.width:
        held = getattr(torch, HELD_SCALES[spec.scale_dtype])
        result["scales"] = _by_tile([_rows(weight, weight.scales).to(device).to(held) for weight in part])
    if spec.zero_points:
        result["zeros"] = _by_tile([_rows(weight, weight.zeros).to(device) for weight in part])
    factors = [factor for weight in part if (factor := _factor(weight, order)) is not None]
    if factors:
        result["factor"] = torch.cat(factors).to(device)
    if order.columns is not None:
        result["columns"] = order.columns.to(torch.int32).to(device)
    return result


def _rows(weight: Weight, shared: torch.Tensor | None) -> torch.Tensor:
    """Return scales or zero points `[N, G]`, once for each output where a block or all of them share one."""
    if shared is None:
        raise TypeError("a weight of unsigned codes without zero points")
    match weight.spec.granularity:
        case PerBlock(n=n):
            return shared.repeat_interleave(n, 0)[: weight.out_features]
        case PerTensor():
            return shared.expand(weight.out_features, -1)
    return shared


def _factor(weight: Weight, order: Order) -> torch.Tensor | None:
    """Return float32 `[N]`, what multiplies whole sums."""
    if not order.slots.width:
        return weight.scale_values().expand(weight.out_features, 1)[:, 0].contiguous()
    if weight.global_scale is None:
        return None
    return weight.global_scale.to(torch.float32).reshape(1).expand(weight.out_features).contiguous()


def _by_tile(rows: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return `[N, G]` of all segments as `[tiles, G, 8, 2]`."""
    whole = torch.cat(list(rows))
    whole = torch.nn.functional.pad(whole, (0, 0, 0, -whole.shape[0] % TILE))
    return whole.view(-1, 2, 8, whole.shape[1]).permute(0, 3, 2, 1).contiguous()


def _codes(part: Sequence[Weight], order: Order, device: torch.device) -> torch.Tensor:
    """Return the stored codes uint8 `[tiles * 16, S]` in the order of slots."""
    element = part[0].spec.element
    rows = sum(weight.out_features for weight in part)
    codes = torch.zeros(-(-rows // TILE) * TILE, order.slots.count, dtype=torch.uint8, device=device)
    columns = None if order.columns is None else order.columns.to(device)
    row = 0
    for weight in part:
        octets = _stored(weight.codes.to(device).view(torch.uint8), element)
        target = codes[row : row + weight.out_features]
        if columns is None:
            target[:, : weight.in_features] = octets
        else:
            taken = columns >= 0
            target[:, taken] = octets.index_select(1, columns[taken])
        row += weight.out_features
    return codes


def _stored(octets: torch.Tensor, element: ElementType) -> torch.Tensor:
    """Return codes as they are stored; for integers the function is its own inverse."""
    if element.floating or (element.bits == 8 and element.signed):
        return octets
    if element.bits == 8:
        return octets ^ 0x80
    # In uint8 the middle is added to two's complement modulo 256.
    return octets + (1 << (element.bits - 1)) if element.signed else octets


def _pack(codes: torch.Tensor, element: ElementType) -> torch.Tensor:
    """Return units of stored codes `[tiles * 16, S]`, as the lanes of a warp take them."""
    tiles, chunks = codes.shape[0] // TILE, codes.shape[1] // CHUNK
    # tile, half of 16 outputs (h), output (g), chunk, step, half of 16 slots (e), lane (q), which of two (p)
    split_up = codes.view(tiles, 2, 8, chunks, 4, 2, 4, 2)
    if element.bits <= 4:
        both = split_up[:, 0] | split_up[:, 1] << 4
        return both.permute(0, 2, 1, 5, 3, 6, 4).reshape(tiles, chunks, -1)
    pairs = codes.view(tiles, 2, 8, chunks, 2, 2, 2, 4, 2)  # the same, with steps in two halves
    return pairs.permute(0, 3, 4, 2, 7, 5, 6, 8, 1).reshape(tiles, chunks, -1)
