"""
The product with a packed weight, and the ways back from it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from quantplug.spec import PerTensor
from quantplug.weight import Weight
from quantplug_cpu.arrange import arrange_inputs
from quantplug_cpu.checks import refuse_rounded
from quantplug_cpu.fit import FAST_DTYPE, MANY_ROWS
from quantplug_cpu.stacked import joined
from quantplug_cpu.tiles import linear_by_tiles, packed_codes, packed_values

if TYPE_CHECKING:
    from quantplug.weight import Prepared
    from quantplug_cpu.stacked import Runs, Stack

_FEW_ROWS = MANY_ROWS[1]
_OPERATOR = torch.ops.aten._weight_int4pack_mm_for_cpu.default


def multiply(x: torch.Tensor, prepared: Prepared, bias: torch.Tensor | None) -> torch.Tensor:
    """
    Return `[..., N]` for x `[..., K]`: by the operator where it is fast, else by tiles.

    Few rows of one sequence on a layer that needs no preparation of x come first and with as few steps as can be: that
    is what a decoding step consists of. What is looked up here a compiled model checks at every call, too.
    """
    group, shape = prepared.meta["direct"], x.shape
    sequence = len(shape) == 3 and shape[0] == 1
    if group and (sequence or len(shape) == 2) and 0 < shape[-2] < _FEW_ROWS and not x.requires_grad:
        tensors = prepared.tensors
        # The operator reads x as if it were contiguous.
        flat = (x.squeeze(0) if sequence else x).contiguous()
        y: torch.Tensor = _OPERATOR(flat, tensors["packed.0"], group, tensors["pairs.0"])
        if bias is not None:
            y.add_(bias)
        return y.unsqueeze(0) if sequence else y
    return _multiply_any(x, prepared, bias)


def multiply_stacked(x: torch.Tensor, runs: Runs, stack: Stack, bias: torch.Tensor | None) -> torch.Tensor:
    """
    Return `[P, N]` for x `[P, K]`, whose rows belong to one expert after the other.

    Args:
        x: in the problem's dtype.
        runs: experts, each with its number of rows.
        stack: packed experts, each of one part.
        bias: `[E, N]` or None.
    """
    meta, dtype = stack.meta, x.dtype
    planes, group, outputs = meta["planes"], meta["group.0"], meta["rows.0"]
    packed, pairs = stack.views["packed.0"], stack.views.get("pairs.0")
    many = 0 if x.requires_grad else meta["many"]
    if pairs is None:
        x, bias = x.to(torch.float32), None if bias is None else bias.to(torch.float32)
    times = planes if many else 1
    slots = _to_slots(x, stack, 0, planes=times)
    products: list[torch.Tensor] = []
    for (expert, count), rows in zip(runs, slots.split([count for _, count in runs]), strict=True):
        if count < many and pairs is not None:
            y = _OPERATOR(rows, packed[expert], group, pairs[expert])
        else:
            one = stack.one(expert)
            # For the operator, two planes take x twice.
            y = linear_by_tiles(
                rows[:, : rows.shape[1] // times], packed[expert], _scales(one, 0), one.tensors.get("zeros.0"), planes
            )
        if meta["empty.0"]:
            y = y[:, :outputs]
        products.append(y if bias is None else y + bias[expert])
    return joined(products).to(dtype)


def _multiply_any(x: torch.Tensor, prepared: Prepared, bias: torch.Tensor | None) -> torch.Tensor:
    rows, parts = x.numel() // x.shape[-1], prepared.meta["parts"]
    flat = x if x.dim() == 2 else x.reshape(rows, x.shape[-1])
    by_tiles = rows >= prepared.meta["many"] or x.requires_grad
    if prepared.problem.dtype != FAST_DTYPE:
        flat = flat.to(torch.float32)
        bias = None if bias is None else bias.to(torch.float32)
    y = _part(flat, prepared, 0, by_tiles=by_tiles)
    if parts > 1:
        others = [_part(flat, prepared, number, by_tiles=by_tiles) for number in range(1, parts)]
        y = torch.cat([y, *others], dim=1)
    if bias is not None:
        y = y + bias
    y = y.to(x.dtype)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[1])


def _part(x: torch.Tensor, prepared: Prepared, number: int, *, by_tiles: bool) -> torch.Tensor:
    """Return `[M, N]` of one part for x `[M, K]`."""
    meta, tensors = prepared.meta, prepared.tensors
    planes, packed = meta["planes"], tensors[f"packed.{number}"]
    x = _to_slots(x, prepared, number, planes=1 if by_tiles else planes)
    y: torch.Tensor
    if by_tiles:
        y = linear_by_tiles(x, packed, _scales(prepared, number), tensors.get(f"zeros.{number}"), planes)
    else:
        y = _OPERATOR(x, packed, meta[f"group.{number}"], tensors[f"pairs.{number}"])
    return y[:, : meta[f"rows.{number}"]].contiguous() if meta[f"empty.{number}"] else y


def _to_slots(x: torch.Tensor, prepared: Prepared, number: int, *, planes: int) -> torch.Tensor:
    """Return x `[M, planes * S]`, its inputs in their slots, 0 in empty ones."""
    pad = prepared.meta[f"pad.{number}"]
    if pad:
        x = torch.nn.functional.pad(x, (0, pad))
    columns = prepared.tensors.get(f"columns.{number}")
    if columns is not None:
        return x.index_select(1, columns if planes == prepared.meta["planes"] else columns[: columns.shape[0] // 2])
    return x.contiguous() if planes == 1 else torch.cat([x, x], dim=1)


def _scales(prepared: Prepared, number: int) -> torch.Tensor:
    """Return the scales `[G, N]` that a part holds."""
    if prepared.problem.dtype != FAST_DTYPE:
        return prepared.tensors[f"scales.{number}"]
    pairs = prepared.tensors[f"pairs.{number}"]
    first = pairs.shape[0] // 2 if prepared.meta["planes"] == 2 else 0
    return pairs[first:, :, 0]


def dequantize(prepared: Prepared, dtype: torch.dtype) -> torch.Tensor:
    """Return the values `[N, K]` of all parts, one below the other."""
    planes = prepared.meta["planes"]
    values = [
        _in_order(
            packed_values(
                prepared.tensors[f"packed.{number}"],
                _scales(prepared, number),
                prepared.tensors.get(f"zeros.{number}"),
                planes,
                dtype,
            ),
            prepared,
            number,
        )
        for number in range(prepared.meta["parts"])
    ]
    return values[0] if len(values) == 1 else torch.cat(values)


def unprepare(prepared: Prepared, kernel: str) -> tuple[Weight, ...]:
    """
    Return the canonical segments, bit by bit.

    Raises:
        NotImplementedError: scales were rounded to bfloat16 on the way in.
    """
    refuse_rounded(prepared, kernel)
    spec = prepared.problem.segments[0].weight
    planes, signed = prepared.meta["planes"], spec.element.signed
    bits = 4 * planes
    middle = 1 << (bits - 1)
    shift = middle if signed else middle - (1 << (spec.element.bits - 1))
    weights: list[Weight] = []
    segments = iter(prepared.problem.segments)
    for number in range(prepared.meta["parts"]):
        codes = _in_order(packed_codes(prepared.tensors[f"packed.{number}"], planes), prepared, number) - shift
        scales = _scales(prepared, number).t()
        zeros = prepared.tensors.get(f"zeros.{number}")
        g_idx = prepared.tensors.get(f"g_idx.{number}")
        first = _first_groups(prepared, number, kernel)
        row = 0
        while row < prepared.meta[f"rows.{number}"]:
            segment = next(segments)
            rows = slice(row, row + segment.out_features)
            row = rows.stop
            shared = slice(rows.start, rows.start + 1) if isinstance(spec.granularity, PerTensor) else rows
            weights.append(
                Weight(
                    codes=codes[rows].view(torch.int8) if signed else codes[rows],
                    scales=scales[shared].index_select(1, first).to(getattr(torch, spec.scale_dtype)),
                    spec=spec,
                    zeros=None if zeros is None else zeros.t()[shared].index_select(1, first) - shift,
                    g_idx=g_idx,
                )
            )
    return tuple(weights)


def _in_order(values: torch.Tensor, prepared: Prepared, number: int) -> torch.Tensor:
    """Return `[N, K]` from `[S, N]`: filled slots only, as the weight's inputs were."""
    inputs = prepared.problem.in_features
    columns = prepared.tensors.get(f"columns.{number}")
    if columns is None:
        ordered = values[:inputs]
    else:
        columns = columns[: values.shape[0]]
        filled = columns < inputs
        ordered = torch.empty(inputs, values.shape[1], dtype=values.dtype)
        ordered[columns[filled]] = values[filled]
    return ordered.t()[: prepared.meta[f"rows.{number}"]]


def _first_groups(prepared: Prepared, number: int, kernel: str) -> torch.Tensor:
    """Return int64 `[G]`, the first of the operator's groups that each of the weight's groups went to."""
    groups = prepared.meta[f"groups.{number}"]
    granularity = prepared.problem.segments[0].weight.granularity
    g_idx = prepared.tensors.get(f"g_idx.{number}")
    placed = arrange_inputs(granularity, prepared.problem.in_features, g_idx, groups).groups
    wanted = torch.arange(groups)
    first = torch.searchsorted(placed, wanted)
    if int(first.max()) >= len(placed) or not torch.equal(placed[first], wanted):
        raise NotImplementedError(f"kernel {kernel} does not hold the scales of groups that no input belongs to")
    return first
