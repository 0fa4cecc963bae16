"""
The layout of FP8 weights that are multiplied with x in FP8, or with x as it is: codes row by row, as files have them.

Products of 8-bit floats, cuBLAS's among them, read weights like this, and so can a kernel for few rows that leaves x as
it is: kernels with this `layout_id` share one copy. `rowprepare.py` makes it; here is what fits into it, and how.

Segments whose rows can lie below each other become one part, else each becomes a part of its own: blocks that would not
begin at a multiple of 128 rows, or stored scales of x that differ. The tensors of part i, for N rows filled up to R and
K inputs filled up to S:

- `codes.i`: a float8 dtype `[R, S]`, row by row, 0 where filled up;
- `scales.i`: float32, `[1, 1]` for one scale, `[1, R]`, or `[S / 128, ceil(R / 128)]`, those of the same rows together;
- `x_scale.i`: float32 `[1]`, the stored scale of x, where there is one.

`one` is float32 `[1]`, a scale of 1, where scales are per token or row. The facts beside them: `parts`, `rows.i` (N),
and `rounded`, whether a scale was float64.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantplug.kernel import Rejected
from quantplug.spec import ElementType, PerBlock, PerChannel, PerTensor

if TYPE_CHECKING:
    from collections.abc import Sequence

    from quantplug.spec import ActivationSpec, LinearProblem, SegmentSpec, WeightSpec

LAYOUT_ID = "fp8.rows"

ELEMENTS = (ElementType.FLOAT8_E4M3FN, ElementType.FLOAT8_E5M2)
SCALES = ("float32", "bfloat16", "float16")
"""Scale dtypes that float32 holds without rounding."""

BLOCK = 128
"""Rows and inputs of a block, and inputs of a group of x: the only size that cuBLAS has."""

_ALIGNED = 16
"""N and K are filled up to a multiple of this, or cuBLAS refuses the product."""

_BLOCK_ALIGNED = 4 * BLOCK
"""
K with blocks: cuBLAS wants as many scales in a row of blocks as a multiple of four. torch 2.11 hands them over as they
lie, so that results for other K are wrong (seen with K of 128, 144 and 640; pytorch/pytorch#166752).
"""


def refuse(problem: LinearProblem) -> Rejected | None:
    """Return why a problem does not fit into the layout, or its file does not permit to multiply it with x in FP8."""
    return _refuse_weight(problem) or _refuse_activation(problem)


def mode_of(problem: LinearProblem) -> str:
    """
    Return how scales are shared in a product: "tensor" for one of x and one of the weight, "row" for one per token or
    output, or "block".
    """
    weight, activation = problem.segments[0].weight, problem.activation
    if isinstance(weight.granularity, PerBlock):
        return "block"
    one = isinstance(weight.granularity, PerTensor) and activation is not None and activation.granularity == "tensor"
    return "tensor" if one else "row"


def width(problem: LinearProblem) -> int:
    """Return K as it is held, filled up."""
    return fill(problem.in_features, _BLOCK_ALIGNED if mode_of(problem) == "block" else _ALIGNED)


def fill(size: int, multiple: int = _ALIGNED) -> int:
    """Return the next multiple."""
    return -(-size // multiple) * multiple


def parts(segments: tuple[SegmentSpec, ...], *, together: bool) -> list[int]:
    """
    Return how many segments share a product, in order: all of them where rows of the weight can lie below each other.

    Args:
        segments: of a problem whose segments share one contract.
        together: whether x has the same codes for all of them.
    """
    blocks = isinstance(segments[0].weight.granularity, PerBlock)
    ragged = blocks and any(segment.out_features % BLOCK for segment in segments[:-1])
    return [1] * len(segments) if ragged or not together else [len(segments)]


def bytes_held(problem: LinearProblem) -> int:
    """Return the bytes of what `prepare` yields; where scales of x are stored, as if they were different ones."""
    mode = mode_of(problem)
    static = problem.activation is not None and not problem.activation.dynamic
    layouts = [parts(problem.segments, together=True)] + ([parts(problem.segments, together=False)] if static else [])
    sizes = []
    for layout in layouts:
        total, first = 0, 0
        for count in layout:
            part = problem.segments[first : first + count]
            first += count
            rows = fill(sum(segment.out_features for segment in part))
            total += rows * width(problem) + 4 * scale_count(mode, part, rows, width(problem)) + (4 if static else 0)
        sizes.append(total + (4 if mode == "row" else 0))
    return max(sizes)


def scale_count(mode: str, part: tuple[SegmentSpec, ...], rows: int, inputs: int) -> int:
    """Return the number of scales that are held for some segments that share a product."""
    if mode == "block":
        return -(-rows // BLOCK) * (inputs // BLOCK)
    return 1 if len(part) == 1 and isinstance(part[0].weight.granularity, PerTensor) else rows


def _refuse_weight(problem: LinearProblem) -> Rejected | None:
    if not problem.uniform:
        kinds = " and ".join(dict.fromkeys(segment.weight.describe() for segment in problem.segments))
        return Rejected("segments", f"segments differ: {kinds}", "split the call, as the core does")
    weight = problem.segments[0].weight
    refusal = refuse_codes(weight, ELEMENTS)
    if refusal is not None:
        return refusal
    if not isinstance(weight.granularity, PerTensor | PerChannel) and weight.granularity != PerBlock(BLOCK, BLOCK):
        wanted = f"per tensor, per channel, or blocks of {BLOCK} x {BLOCK}"
        return Rejected("granularity", shared_by(weight), wanted)
    sizes = (("in_features", problem.in_features), *(("out_features", s.out_features) for s in problem.segments))
    for name, size in sizes:
        if size < 1:
            return Rejected("shape", f"{name} is {size}", "at least 1")
    return None


def refuse_codes(weight: WeightSpec, elements: Sequence[str]) -> Rejected | None:
    """Return why a weight's codes, of one of some types, and their scales are none of this layout."""
    if weight.element not in elements:
        return Rejected("element", f"codes are {weight.element}", " or ".join(elements))
    if weight.act_order:
        return Rejected("act_order", "g_idx gives inputs an order of their own", "weights in the order of inputs")
    if weight.scale_dtype not in SCALES:
        return Rejected("dtype", f"scales in {weight.scale_dtype}", f"use one of {', '.join(SCALES)}")
    if weight.global_scale:
        return Rejected("dtype", "a global scale multiplies the scales", "scales without one")
    return None


def shared_by(weight: WeightSpec) -> str:
    """Return what shares a scale, in words."""
    shared = weight.granularity
    return f"blocks of {shared.n} x {shared.k}" if isinstance(shared, PerBlock) else weight.describe()


def _refuse_activation(problem: LinearProblem) -> Rejected | None:
    activation, weight = problem.activation, problem.segments[0].weight
    if activation is None:
        return Rejected("activation", "the file permits none", "a kernel that leaves x as it is")
    blocks = isinstance(weight.granularity, PerBlock)
    wanted = f"float8_e4m3fn group {BLOCK}, dynamic" if blocks else "float8 per token or tensor"
    if not _takes(activation, blocks=blocks):
        return Rejected("activation", f"x as {activation.describe()} for {weight.describe()}", wanted)
    if ElementType.FLOAT8_E5M2 in (activation.element, weight.element) and (
        blocks or activation.element is weight.element
    ):
        return Rejected("activation", f"x as {activation.element} for {weight.element}", "float8_e4m3fn on one side")
    return None


def _takes(activation: ActivationSpec, *, blocks: bool) -> bool:
    if activation.element not in ELEMENTS or activation.scale_dtype != "float32" or activation.global_scale:
        return False
    if blocks:
        return activation.granularity == "group" and activation.group_size == BLOCK and activation.dynamic
    return activation.granularity == "tensor" or (activation.granularity == "token" and activation.dynamic)
