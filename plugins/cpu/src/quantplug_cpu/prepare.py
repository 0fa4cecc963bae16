"""
From canonical weights into the packed layout, a piece of the inputs at a time.

No temporary is as large as the layer: codes go through a small scratch buffer, straight into their final
place. Where canonical codes are the view of a `[K, N]` buffer nothing is transposed on the way.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from quantplug_cpu.arrange import arrange_inputs, share_order
from quantplug_cpu.checks import check, place, survives
from quantplug_cpu.fit import FAST_DTYPE, MANY_ROWS
from quantplug_cpu.layout import LOW_NIBBLES, Packer, known, repeated
from quantplug_cpu.slots import filled

if TYPE_CHECKING:
    from collections.abc import Sequence

    from quantplug.spec import ElementType, LinearProblem
    from quantplug.weight import Prepared, Weight
    from quantplug_cpu.arrange import Inputs
    from quantplug_cpu.checks import Place


_STEP_WORDS = 1 << 15
"""
What torch leaves to one thread. On a busy machine, waiting for a second one costs more than such a step does.
"""


def prepare(
    problem: LinearProblem, segments: Sequence[Weight], planes: int, layout_id: str, out: Prepared | None
) -> Prepared:
    """
    Return the packed form of a layer whose segments share one contract.

    Segments that read their inputs in one order become one weight; with several orders each becomes a part. The
    tensors of part i are

    - `packed.i`: uint8 `[N, planes * S / 2]`, nibbles in the operator's order;
    - `pairs.i`: bfloat16 `[planes * G, N, 2]`, scale and offset, for an x in bfloat16; else
      `scales.i`: `[G, N]` as stored;
    - `zeros.i`: uint8 `[G, N]`, zero points in the terms of the nibbles, where there are any;
    - `columns.i`: int32 `[planes * S]`, the input that each slot takes, K for none, where inputs move;
    - `g_idx.i`: int32 `[K]`, as given.

    Here N is filled up to a multiple of 64, S and G are slots and the operator's groups. `exact` tells whether the
    scales are those of the file.

    Args:
        problem: what the kernel accepted.
        segments: canonical weights.
        planes: 1 to pack nibbles, 2 to pack the halves of 8-bit codes.
        layout_id: of the kernel.
        out: an earlier result, to be overwritten.

    Raises:
        ValueError: a tensor does not have the shape or dtype that the contract says, or does not fit into `out`.
    """
    check(segments, problem.in_features)
    parts = share_order(segments)
    arranged = [
        arrange_inputs(part[0].spec.granularity, problem.in_features, part[0].g_idx, part[0].scales.shape[1])
        for part in parts
    ]
    fast = problem.dtype == FAST_DTYPE
    held = torch.bfloat16 if fast else segments[0].scales.dtype
    wanted: dict[str, Place] = {"exact": ((), torch.bool)}
    meta = {"parts": len(parts), "planes": planes, "many": MANY_ROWS[planes] if fast else 0}
    for number, (part, inputs) in enumerate(zip(parts, arranged, strict=True)):
        rows, pad = _rows(part), inputs.slots.count - problem.in_features
        for name, shape_and_dtype in _tensors(part, inputs, planes, held, fast=fast).items():
            wanted[f"{name}.{number}"] = shape_and_dtype
        meta[f"rows.{number}"], meta[f"empty.{number}"] = rows, filled(rows) - rows
        meta[f"pad.{number}"] = pad if inputs.sources is None else min(pad, 1)
        meta[f"group.{number}"], meta[f"groups.{number}"] = inputs.slots.group, part[0].scales.shape[1]
    # The operator's group where x and y need nothing but the operator, else 0.
    direct = fast and (planes, len(parts), meta["pad.0"], meta["empty.0"]) == (1, 1, 0, 0) and "columns.0" not in wanted
    meta["direct"] = meta["group.0"] if direct else 0
    result = place(wanted, meta, problem, layout_id, out)
    result.tensors["exact"].fill_(survives(segments, held))
    for number, (part, inputs) in enumerate(zip(parts, arranged, strict=True)):
        tensors = {
            name.rpartition(".")[0]: tensor
            for name, tensor in result.tensors.items()
            if name.rpartition(".")[2] == str(number)
        }
        _pack_codes(part, inputs, planes, tensors["packed"])
        _write_scales(part, inputs, planes, tensors)
        if inputs.sources is not None:
            tensors["columns"].copy_(inputs.sources.repeat(planes))
        if part[0].g_idx is not None:
            tensors["g_idx"].copy_(part[0].g_idx)
    return result


def _rows(part: Sequence[Weight]) -> int:
    return sum(weight.out_features for weight in part)


def _tensors(part: Sequence[Weight], inputs: Inputs, planes: int, held: torch.dtype, *, fast: bool) -> dict[str, Place]:
    """Return shape and dtype of each tensor of a part."""
    slots, rows = inputs.slots, filled(_rows(part))
    wanted: dict[str, Place] = {"packed": ((rows, planes * slots.count // 2), torch.uint8)}
    if fast:
        wanted["pairs"] = (planes * slots.groups, rows, 2), held
    else:
        wanted["scales"] = (slots.groups, rows), held
    if part[0].zeros is not None:
        wanted["zeros"] = (slots.groups, rows), torch.uint8
    if inputs.sources is not None:
        wanted["columns"] = (planes * slots.count,), torch.int32
    if part[0].g_idx is not None:
        wanted["g_idx"] = tuple(part[0].g_idx.shape), torch.int32
    return wanted


def _pack_codes(part: Sequence[Weight], inputs: Inputs, planes: int, out: torch.Tensor) -> None:
    packer, rows, count, bits = Packer(out, known()), out.shape[0], inputs.slots.count, 4 * planes
    # A step over all rows is as much to torch as packing two of them, which is over every other row.
    step = max(1, 8 * _STEP_WORDS // rows)
    scratch = torch.empty(min(count, step * 2 // planes), rows // 8, dtype=torch.int64)
    scratch.view(torch.uint8)[:, _rows(part) :] = 1 << (bits - 1)
    half = torch.empty_like(scratch) if planes == 2 else scratch
    for begin in range(0, count, scratch.shape[0]):
        piece = scratch[: min(scratch.shape[0], count - begin)]
        for words, start in zip(piece.split(step), range(begin, count, step), strict=False):
            _gather_codes(part, inputs, start, words.view(torch.uint8), bits)
        if planes == 2:
            nibbles = half[: len(piece)]
            torch.bitwise_right_shift(piece, 4, out=nibbles).bitwise_and_(LOW_NIBBLES)
            packer.write(nibbles.view(torch.uint8), begin)
            piece.bitwise_and_(LOW_NIBBLES)
        packer.write(piece.view(torch.uint8), begin + count * (planes - 1))


def _gather_codes(part: Sequence[Weight], inputs: Inputs, begin: int, piece: torch.Tensor, bits: int) -> None:
    """Fill uint8 `[k, N]` with the codes of k slots, in the terms of the packed width."""
    row = 0
    for weight in part:
        target = piece[:, row : row + weight.out_features]
        row += weight.out_features
        codes = weight.codes.view(torch.uint8).t()
        if inputs.sources is None:
            source = codes[begin : begin + len(piece)]
            target[len(source) :] = 1 << (bits - 1)
        else:
            # Whatever an empty slot holds is multiplied by 0.
            source = codes.index_select(0, inputs.sources[begin : begin + len(piece)].clamp(max=weight.in_features - 1))
        _move_middle(source, target[: len(source)], weight.spec.element, bits)


def _move_middle(source: torch.Tensor, target: torch.Tensor, element: ElementType, bits: int) -> None:
    """Write codes `[k, N]` to where their middle is that of unsigned codes of `bits` bits."""
    shift = _shift(element, bits)
    strides = (source.shape[1], source.stride(0), source.storage_offset(), target.storage_offset())
    if source.stride(1) != 1 or any(n % 8 for n in strides):
        # Adding in uint8 is modulo 256, which turns two's complement into the unsigned code.
        torch.add(source, shift, out=target)
        return
    # Eight codes at a time, without a carry between them: in two's complement, adding the middle flips the sign's bit.
    words, result = source.view(torch.int64), target.view(torch.int64)
    if element.signed:
        torch.bitwise_and(words, repeated((1 << bits) - 1), out=result)
        result.bitwise_xor_(repeated(1 << (bits - 1)))
    else:
        torch.add(words, repeated(shift), out=result)


def _shift(element: ElementType, bits: int) -> int:
    """Return what takes a code's middle to that of unsigned codes of `bits` bits."""
    return (1 << (bits - 1)) - (0 if element.signed else 1 << (element.bits - 1))


def _write_scales(part: Sequence[Weight], inputs: Inputs, planes: int, tensors: dict[str, torch.Tensor]) -> None:
    groups, bits, pairs = inputs.slots.groups, 4 * planes, tensors.get("pairs")
    # An 8-bit code's own scale is that of its lower half.
    scales = tensors["scales"] if pairs is None else pairs[groups * (planes - 1) :, :, 0]
    zeros = tensors.get("zeros")
    rows = _rows(part)
    scales[:, rows:] = 0
    if zeros is not None:
        zeros[:, rows:] = 1 << (bits - 1)
    row = 0
    for weight in part:
        columns = slice(row, row + weight.out_features)
        row += weight.out_features
        scales[:, columns] = weight.scales.t().index_select(0, inputs.groups)
        if zeros is not None and weight.zeros is not None:
            zeros[:, columns] = weight.zeros.t().index_select(0, inputs.groups) + _shift(weight.spec.element, bits)
    if pairs is not None:
        _complete(pairs, scales, zeros, planes)


def _complete(pairs: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, planes: int) -> None:
    """
    Fill in what the operator computes `(nibble - 8) * scale + offset` with, beside the scales.

    The offset of a 4-bit code is `(8 - zero) * scale`. An 8-bit code is `16 * high + low`, and
    `(code - zero) * scale = ((high - 8) * 16 * scale + (128 - zero) * scale) + ((low - 8) * scale + 8 * scale)`.
    Offsets use the rounded scale, so that a code that equals its zero point stays near 0.
    """
    exact = scales.to(torch.float32)
    middle = 1 << (4 * planes - 1)
    offset = 0 if zeros is None else exact * (middle - zeros.to(torch.float32))
    pairs[: len(scales), :, 1] = offset
    if planes == 2:
        pairs[: len(scales), :, 0] = exact * 16
        pairs[len(scales) :, :, 1] = exact * 8
