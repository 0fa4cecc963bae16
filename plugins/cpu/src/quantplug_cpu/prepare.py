"""
From canonical weights into the packed layout, a piece of the inputs at a time.

No temporary is as large as the layer: codes go through one scratch buffer of a megabyte, straight into their final
place. Where canonical codes are the view of a `[K, N]` buffer nothing is transposed on the way.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from quantplug.spec import PerGroup, PerTensor, group_count
from quantplug.weight import Prepared
from quantplug_cpu.fit import FAST_DTYPE, MANY_ROWS_PACKED
from quantplug_cpu.layout import known, pack
from quantplug_cpu.slots import Slots, arrange, filled, group_sizes, stays_in_order

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from quantplug.spec import Granularity, LinearProblem
    from quantplug.weight import Weight

_PIECE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Inputs:
    """
    Where the inputs of a weight go.

    Attributes:
        slots: the arrangement.
        groups: int64 `[S / q]`, the weight's group that each of the operator's groups belongs to.
        sources: int64 `[S]`, the input in each slot and K in empty ones; None when inputs stay in order.
    """

    slots: Slots
    groups: torch.Tensor
    sources: torch.Tensor | None


def prepare(
    problem: LinearProblem, segments: Sequence[Weight], planes: int, layout_id: str, out: Prepared | None
) -> Prepared:
    """
    Return the packed form of a layer whose segments share one contract.

    Segments that read their inputs in one order become one weight; with several orders each becomes a part.

    Args:
        problem: what the kernel accepted.
        segments: canonical weights.
        planes: 1 to pack nibbles, 2 to pack the halves of 8-bit codes.
        layout_id: of the kernel.
        out: an earlier result, to be overwritten.

    Raises:
        ValueError: a tensor does not have the shape or dtype that the contract says, or the weight's inputs are grouped
            differently than those of `out`.
    """
    for weight in segments:
        check(weight, problem.in_features)
        if weight.scales.dtype != segments[0].scales.dtype:
            raise ValueError(f"scales are {segments[0].scales.dtype} and {weight.scales.dtype}")
    parts = _share_order(segments)
    fast = problem.dtype == FAST_DTYPE
    exact = not fast or segments[0].scales.dtype == torch.bfloat16
    tensors: dict[str, torch.Tensor] = {}
    meta = {"parts": len(parts), "planes": planes, "exact": int(exact)}
    old = None if out is None else out.tensors
    for number, part in enumerate(parts):
        rows = sum(weight.out_features for weight in part)
        groups = part[0].scales.shape[1]
        inputs = arrange_inputs(part[0].spec.granularity, problem.in_features, part[0].g_idx, groups)
        fill = Fill(tensors, old, number)
        _pack_codes(part, inputs, planes, fill.take("packed", (filled(rows), planes * inputs.slots.count // 2)))
        _write_scales(part, inputs, planes, fill, fast=fast)
        pad = inputs.slots.count - problem.in_features
        if inputs.sources is not None:
            fill.take("columns", (planes * inputs.slots.count,), torch.int32).copy_(inputs.sources.repeat(planes))
            pad = min(pad, 1)
        if part[0].g_idx is not None:
            fill.take("g_idx", (problem.in_features,), torch.int32).copy_(part[0].g_idx)
        meta |= {f"rows.{number}": rows, f"pad.{number}": pad}
        meta |= {f"groups.{number}": groups, f"group.{number}": inputs.slots.group}
    one = len(parts) == 1
    meta["few"] = MANY_ROWS_PACKED if fast and one else 0
    meta["direct"] = int(planes == 1 and meta["pad.0"] == 0 and "columns.0" not in tensors)
    meta["empty"] = tensors["packed.0"].shape[0] - meta["rows.0"]
    if out is None:
        return Prepared(layout_id, problem, tensors, meta)
    if tensors.keys() != out.tensors.keys() or meta != out.meta:
        raise ValueError("the new weights read their inputs in another order than those they replace")
    return out


def check(weight: Weight, in_features: int) -> None:
    """
    Check the shapes that the operators rely on and do not check.

    Raises:
        ValueError: names the tensor and both shapes.
    """
    n, k = weight.codes.shape
    if k != in_features:
        raise ValueError(f"codes have {k} inputs, not {in_features}")
    groups = group_count(weight.spec.granularity, k)
    if weight.g_idx is not None:
        if weight.g_idx.shape != (k,):
            raise ValueError(f"g_idx is {list(weight.g_idx.shape)}, not {[k]}")
        groups = weight.scales.shape[1]
        if int(weight.g_idx.min()) < 0 or int(weight.g_idx.max()) >= groups:
            raise ValueError(f"g_idx is not within the {groups} groups that have scales")
    shape = (1 if isinstance(weight.spec.granularity, PerTensor) else n, groups)
    if weight.scales.shape != shape:
        raise ValueError(f"scales are {list(weight.scales.shape)}, not {list(shape)}")
    if (weight.zeros is None) != weight.spec.element.signed:
        raise ValueError(f"zero points are {'missing' if weight.zeros is None else 'there'} for {weight.spec.element}")
    if weight.zeros is not None and weight.zeros.shape != shape:
        raise ValueError(f"zero points are {list(weight.zeros.shape)}, not {list(shape)}")
    wanted = torch.int8 if weight.spec.element.signed else torch.uint8
    if weight.codes.dtype != wanted:
        raise ValueError(f"codes are {weight.codes.dtype}, not {wanted}")


def arrange_inputs(granularity: Granularity, k: int, g_idx: torch.Tensor | None, groups: int) -> Inputs:
    """Return where K inputs go that belong to G groups, evenly or as `g_idx` says."""
    if g_idx is None:
        slots = arrange(group_sizes(granularity, k))
        size = granularity.size if isinstance(granularity, PerGroup) else k
        if stays_in_order(granularity, k, slots):
            return Inputs(slots, torch.arange(slots.groups) * slots.group // size, None)
        index = torch.arange(k) // size
    else:
        index = g_idx.to(torch.int64)
    order = torch.argsort(index, stable=True)
    counts = torch.bincount(index, minlength=groups)
    sizes = Counter(counts.tolist())
    del sizes[0]
    slots = arrange(sizes)
    needed = (counts + slots.group - 1) // slots.group
    # The j-th input of a group goes to the j-th slot of that group.
    starts = (needed.cumsum(0) - needed) * slots.group - (counts.cumsum(0) - counts)
    sources = torch.full((slots.count,), k)
    sources[starts[index[order]] + torch.arange(k)] = order
    moved = not torch.equal(sources, torch.arange(k))
    return Inputs(slots, torch.repeat_interleave(needed), sources if moved else None)


class Fill:
    """Hands out the tensors of one part: those of an earlier result where there is one, else new ones."""

    def __init__(self, tensors: dict[str, torch.Tensor], old: Mapping[str, torch.Tensor] | None, part: int) -> None:
        self._tensors, self._old, self._part = tensors, old, part

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype = torch.uint8) -> torch.Tensor:
        """
        Return the tensor of that name to be filled.

        Raises:
            ValueError: the earlier result has none like it.
        """
        name = f"{name}.{self._part}"
        if self._old is None:
            tensor = torch.empty(shape, dtype=dtype)
        else:
            old = self._old.get(name)
            if old is None or old.shape != shape or old.dtype != dtype:
                raise ValueError("the new weights read their inputs in another order than those they replace")
            tensor = old
        self._tensors[name] = tensor
        return tensor


def _share_order(segments: Sequence[Weight]) -> list[Sequence[Weight]]:
    """Return the segments as one part when all read their inputs in one order, else one part each."""
    first = segments[0].g_idx
    for weight in segments[1:]:
        other = weight.g_idx
        same = first is None if other is None else first is not None and torch.equal(first, other)
        if not same or weight.scales.shape[1] != segments[0].scales.shape[1]:
            return [(weight,) for weight in segments]
    return [segments]


def _pack_codes(part: Sequence[Weight], inputs: Inputs, planes: int, out: torch.Tensor) -> None:
    layout, (rows, count) = known(), (out.shape[0], inputs.slots.count)
    bits = 4 * planes
    scratch = torch.full((min(count, max(1, _PIECE_BYTES // rows)), rows), 1 << (bits - 1), dtype=torch.uint8)
    halves = torch.empty_like(scratch) if planes == 2 else None
    for begin in range(0, count, scratch.shape[0]):
        piece = scratch[: min(scratch.shape[0], count - begin)]
        _gather_codes(part, inputs, begin, piece, bits)
        if halves is None:
            pack(piece, out, begin, layout)
        else:
            half = halves[: piece.shape[0]]
            pack(torch.bitwise_right_shift(piece, 4, out=half), out, begin, layout)
            pack(torch.bitwise_and(piece, 15, out=half), out, count + begin, layout)


def _gather_codes(part: Sequence[Weight], inputs: Inputs, begin: int, piece: torch.Tensor, bits: int) -> None:
    """Fill `[k, N]` with the codes of k slots, shifted so that all widths have their middle at that of `bits`."""
    row = 0
    for weight in part:
        end = min(begin + piece.shape[0], weight.in_features)
        target = piece[:, row : row + weight.out_features]
        row += weight.out_features
        codes = weight.codes.view(torch.uint8).t()
        if inputs.sources is None:
            source = codes[begin:end]
            target[end - begin :] = 1 << (bits - 1)
        else:
            # Whatever an empty slot holds is multiplied by 0.
            source = codes.index_select(0, inputs.sources[begin : begin + len(piece)].clamp(max=weight.in_features - 1))
        # Adding in uint8 is modulo 256, which turns two's complement into the unsigned code.
        torch.add(source, _shift(weight, bits), out=target[: len(source)])


def _shift(weight: Weight, bits: int) -> int:
    """What takes a code's middle to that of the packed width."""
    element = weight.spec.element
    return 1 << (bits - 1) if element.signed else (1 << (bits - 1)) - (1 << (element.bits - 1))


def _write_scales(part: Sequence[Weight], inputs: Inputs, planes: int, fill: Fill, *, fast: bool) -> None:
    rows, groups, bits = sum(weight.out_features for weight in part), inputs.slots.groups, 4 * planes
    shape = (groups, filled(rows))
    if fast:
        pairs = fill.take("pairs", (planes * groups, shape[1], 2), torch.bfloat16)
        pairs[:, rows:] = 0
        scales = pairs[groups * (planes - 1) :, :, 0]
    else:
        scales = fill.take("scales", shape, part[0].scales.dtype)
        scales[:, rows:] = 0
    zeros = None if part[0].zeros is None else fill.take("zeros", shape)
    if zeros is not None:
        zeros[:, rows:] = 1 << (bits - 1)
    row = 0
    for weight in part:
        columns = slice(row, row + weight.out_features)
        row += weight.out_features
        scales[:, columns] = weight.scales.t().index_select(0, inputs.groups)
        if zeros is not None and weight.zeros is not None:
            zeros[:, columns] = weight.zeros.t().index_select(0, inputs.groups) + _shift(weight, bits)
    if fast:
        _write_pairs(pairs, scales, zeros, planes)


def _write_pairs(pairs: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, planes: int) -> None:
    """
    Write what the operator computes `(nibble - 8) * scale + offset` with.

    The offset of 4-bit codes is `(8 - zero) * scale`. An 8-bit code is `16 * high + low`, so
    `(code - zero) * scale = (high - 8) * 16 * scale + (low - 8) * scale + (136 - zero) * scale`.
    Offsets use the rounded scale, so that a code that equals its zero point stays near 0.
    """
    groups = scales.shape[0]
    exact = scales.to(torch.float32)
    middle = 8 if planes == 1 else 136
    zero: int | torch.Tensor = middle - 8 if planes == 2 else 8
    if zeros is not None:
        zero = zeros.to(torch.float32)
    pairs[groups * (planes - 1) :, :, 1] = exact * (middle - zero)
    if planes == 2:
        pairs[:groups, :, 0] = exact * 16
        pairs[:groups, :, 1] = 0
