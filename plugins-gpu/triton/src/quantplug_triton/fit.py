"""
What the kernel takes, what it refuses, and what it costs: known without a GPU and without Triton.
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

from quantplug.kernel import Accepted, Cost, Rejected, Verdict
from quantplug.spec import ElementType, PerBlock, PerGroup, PerTensor, scale_shape
from quantplug_triton.slots import arrange, group_sizes

if TYPE_CHECKING:
    from quantplug.platform import Platform
    from quantplug.spec import LinearProblem, SegmentSpec, WeightSpec
    from quantplug_triton.slots import Slots

DTYPES = ("bfloat16", "float16", "float32")
HELD_SCALES = {
    "float16": "float16",
    "bfloat16": "bfloat16",
    "float32": "float32",
    "float8_e8m0fnu": "uint8",
    "float8_e4m3fn": "float16",
}
"""Scale dtype of a file -> the dtype in which scales are held: without rounding, and known to every GPU and Triton."""

TILE_ROWS = 64
"""N is filled up to a multiple of this many rows of the weight, which lie side by side."""

_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4, "uint8": 1}
_REFUSED = frozenset({ElementType.FLOAT8_E4M3FNUZ, ElementType.FLOAT8_E5M2FNUZ})
_OLDEST = (8, 0)
_MOST_SLOTS = 4
"""Slots per input from which on so many are empty that the layout makes no sense."""

# One H100: bytes per microsecond of a stream of weights, products of a weight and a row per microsecond, and a launch.
_BYTES_PER_US = 1.8e6
_PRODUCTS_PER_US = 1.5e8
LAUNCH_US = 6.0


def field_bits(element: ElementType) -> int:
    """Return the width in which a code is held: 2, 4 or 8 bits."""
    return {2: 2, 3: 4, 4: 4}.get(element.bits, 8)


def verdict(problem: LinearProblem, platform: Platform) -> Verdict:
    """Return whether the kernel runs a problem on a platform, and at what cost."""
    refusal = refuse_place(problem, platform) or refuse_weight(problem)
    if refusal is not None:
        return refusal
    weight, k, n = problem.segments[0].weight, problem.in_features, problem.out_features
    bits = field_bits(weight.element)
    slots = arrange(group_sizes(weight.granularity, k), 8 // bits)
    if slots.count > _MOST_SLOTS * k + 2 * slots.chunk * slots.fields:
        size = max(group_sizes(weight.granularity, k))
        return Rejected("granularity", f"groups of {size} inputs would be filled up to {slots.chunk}", "groups of 16")
    held = _bytes_of(problem, slots)
    notes = ["x is gathered in the order of groups"] if weight.act_order else []
    if slots.count > k + slots.chunk * slots.fields:
        notes.append(f"empty slots: {k} inputs are laid out as {slots.count}")
    return Accepted(
        Cost(LAUNCH_US + held / _BYTES_PER_US, n * k / _PRODUCTS_PER_US),
        extra_bytes=max(0, held - problem.stored_bytes),
        notes=tuple(notes),
    )


def parts(problem: LinearProblem) -> list[list[SegmentSpec]]:
    """Return the segments that share a launch: none that has an order of inputs, a factor or blocks of its own."""
    weight = problem.segments[0].weight
    apart = weight.act_order or weight.global_scale or isinstance(weight.granularity, PerBlock)
    return [[segment] for segment in problem.segments] if apart else [list(problem.segments)]


def scale_bytes(weight: WeightSpec) -> int:
    """Return the bytes of a scale as it is held, and of its zero point."""
    return _BYTES[HELD_SCALES[weight.scale_dtype]] + weight.zero_points


def is_moved(weight: WeightSpec, slots: Slots, inputs: int) -> bool:
    """Whether inputs have an order of their own, or groups are filled up."""
    size = max(group_sizes(weight.granularity, inputs))
    return weight.act_order or (slots.groups > 1 and slots.chunk * slots.per_group != size)


def _bytes_of(problem: LinearProblem, slots: Slots) -> int:
    """Return the bytes of what `prepare` yields; act-order is taken to fill every group equally."""
    weight, k = problem.segments[0].weight, problem.in_features
    moved = is_moved(weight, slots, k)
    per_scale = scale_bytes(weight)
    total = 0
    for part in parts(problem):
        rows = sum(segment.out_features for segment in part)
        total += slots.count * -(-rows // TILE_ROWS) * TILE_ROWS * field_bits(weight.element) // 8
        spread = isinstance(weight.granularity, PerTensor) and len(part) > 1
        total += (rows if spread else prod(scale_shape(weight.granularity, rows, k))) * per_scale
        total += (4 * slots.count if moved else 0) + (4 if weight.global_scale else 0)
    return total


def refuse_place(problem: LinearProblem, platform: Platform) -> Rejected | None:
    """Return why no kernel here runs on a platform or with a dtype, or None."""
    if platform.kind != "cuda":
        return Rejected("platform", f"runs on cuda, not on {platform}")
    version = tuple(int(part) for part in platform.arch.split(".") if part.isdecimal())
    if version and version < _OLDEST:
        return Rejected("arch", f"compute capability {platform.arch}", "8.0 or newer")
    if problem.dtype not in DTYPES:
        return Rejected("dtype", f"activation dtype {problem.dtype}", f"use one of {', '.join(DTYPES)}")
    return None


def refuse_weight(problem: LinearProblem) -> Rejected | None:
    """Return why no kernel here reads a weight, or None."""
    if not problem.uniform:
        kinds = " and ".join(dict.fromkeys(segment.weight.describe() for segment in problem.segments))
        return Rejected("segments", f"segments differ: {kinds}", "split the call, as the core does")
    weight = problem.segments[0].weight
    if weight.element in _REFUSED:
        return Rejected("element", f"codes are {weight.element}", "float8_e4m3fn or float8_e5m2")
    if weight.scale_dtype not in HELD_SCALES:
        return Rejected("dtype", f"scales in {weight.scale_dtype}", f"use one of {', '.join(HELD_SCALES)}")
    sizes = (("in_features", problem.in_features), *(("out_features", s.out_features) for s in problem.segments))
    for name, size in sizes:
        if size < 1:
            return Rejected("shape", f"{name} is {size}", "at least 1")
    if isinstance(weight.granularity, PerGroup) and weight.granularity.size < 1:
        return Rejected("granularity", f"group size {weight.granularity.size}", "at least 1")
    return None
