"""
What the kernel takes, what it refuses, and what it costs: known without a GPU and without humming.
"""

from __future__ import annotations

from math import lcm
from typing import TYPE_CHECKING

from quantplug.kernel import Accepted, Cast, Cost, Rejected, Verdict
from quantplug.spec import ElementType, PerBlock, PerChannel, PerGroup, PerTensor

if TYPE_CHECKING:
    from quantplug.platform import Platform
    from quantplug.spec import LinearProblem, WeightSpec

DTYPE = "bfloat16"
"""Of x. In float16, sums of codes may leave its range before a scale brings them back."""

ELEMENTS = (ElementType.INT4, ElementType.UINT4, ElementType.INT8, ElementType.FLOAT8_E4M3FN)
SCALES = ("float16", "bfloat16", "float32", "float8_e8m0fnu")

_OLDEST = (8, 0)
_ROWS = 128
"""N is filled up to a multiple of this: humming's own choice of tiles has an assertion about it."""

ALIGNED = 8
"""What humming fills up by itself is a multiple of this; the rest of x and y is cut off here."""

_GROUPS = (32, 64, 128, 256)

_WHOLE = 1024
"""Inputs up to which humming never cuts a sum into parts."""

# One H100, see benchmarks/gpu/README.md: bytes of a stream of weights and products per microsecond, one launch.
_BYTES_PER_US = 2.9e6
_PRODUCTS_PER_US = 3.6e8
_LAUNCH_US = 6.2


def verdict(problem: LinearProblem, platform: Platform) -> Verdict:
    """Return whether the kernel runs a problem on a platform, and at what cost."""
    refusal = _refuse_place(problem, platform) or _refuse_weight(problem)
    if refusal is not None:
        return refusal
    rows, inputs = filled(problem)
    held, same = _bytes_held(problem), (rows, inputs) == (problem.out_features, problem.in_features)
    return Accepted(
        Cost(_LAUNCH_US + held / _BYTES_PER_US, rows * inputs / _PRODUCTS_PER_US),
        casts=casts(problem),
        extra_bytes=max(0, held - problem.stored_bytes),
        notes=() if same else (f"filled up to [{rows}, {inputs}]",),
    )


def group_size(weight: WeightSpec) -> int:
    """Return the inputs that share a scale in humming's terms; 0 for one scale per row or for the whole weight."""
    match weight.granularity:
        case PerGroup(size=size) | PerBlock(k=size):
            return size
        case _:
            return 0


def one_scale(problem: LinearProblem) -> bool:
    """Return whether a single scale multiplies the float32 sums."""
    return isinstance(problem.segments[0].weight.granularity, PerTensor) and len(problem.segments) == 1


def filled(problem: LinearProblem) -> tuple[int, int]:
    """Return N and K as they are held, filled up to what humming takes."""
    rows, inputs = _ROWS, lcm(128, group_size(problem.segments[0].weight) or 1)
    return -(-problem.out_features // rows) * rows, -(-problem.in_features // inputs) * inputs


def casts(problem: LinearProblem) -> tuple[Cast, ...]:
    """
    Return the roundings: where a row has several scales, weights are multiplied out in bfloat16, with scales in it; one
    scale per row multiplies sums in bfloat16, to which they were rounded, and so is a bias added. A sum over more than
    1024 inputs may be cut into parts that are added up in bfloat16.
    """
    weight, dtype = problem.segments[0].weight, DTYPE
    found: list[Cast] = []
    exact = one_scale(problem) or weight.scale_dtype in ("float8_e8m0fnu", dtype)
    if not exact:
        found.append(Cast("scales", dtype))
    if group_size(weight) and weight.scale_dtype != "float8_e8m0fnu":
        found.append(Cast("weights", dtype))
    if problem.bias or not (group_size(weight) or one_scale(problem)):
        found.append(Cast("partials", dtype))
    if filled(problem)[1] > _WHOLE:
        found.append(Cast("splits", dtype))
    return tuple(found)


def _bytes_held(problem: LinearProblem) -> int:
    rows, inputs = filled(problem)
    weight = problem.segments[0].weight
    groups = inputs // (group_size(weight) or inputs)
    scale_bytes = 1 if weight.scale_dtype == "float8_e8m0fnu" else 2
    zeros = rows * groups // 2 if weight.zero_points else 0
    scales = 4 if one_scale(problem) else rows * groups * scale_bytes
    return rows * inputs * weight.element.bits // 8 + scales + zeros


def _refuse_place(problem: LinearProblem, platform: Platform) -> Rejected | None:
    if platform.kind != "cuda":
        return Rejected("platform", f"runs on cuda, not on {platform}")
    if platform.arch:
        version = tuple(int(part) for part in platform.arch.split(".") if part.isdecimal())
        if version < _OLDEST:
            return Rejected("arch", f"compute capability {platform.arch}", "8.0 or newer, of NVIDIA")
    if problem.dtype != DTYPE:
        return Rejected("dtype", f"activation dtype {problem.dtype}", f"use {DTYPE}")
    return None


def _refuse_weight(problem: LinearProblem) -> Rejected | None:
    if not problem.uniform:
        kinds = " and ".join(dict.fromkeys(segment.weight.describe() for segment in problem.segments))
        return Rejected("segments", f"segments differ: {kinds}", "split the call, as the core does")
    weight = problem.segments[0].weight
    if weight.element not in ELEMENTS:
        return Rejected("element", f"codes are {weight.element}", f"use one of {', '.join(ELEMENTS)}")
    if weight.act_order:
        return Rejected("act_order", "g_idx gives inputs an order of their own", "weights in the order of inputs")
    if weight.scale_dtype not in SCALES or weight.global_scale:
        what = "a global scale multiplies scales" if weight.global_scale else "scales"
        return Rejected("dtype", f"{what} in {weight.scale_dtype}", f"use one of {', '.join(SCALES)}")
    return _refuse_granularity(weight) or _refuse_sizes(problem)


def _refuse_granularity(weight: WeightSpec) -> Rejected | None:
    shared, powers = weight.granularity, weight.scale_dtype == "float8_e8m0fnu"
    if isinstance(shared, PerBlock) and (powers or (shared.n, shared.k) != (128, 128)):
        return Rejected("granularity", f"blocks of {shared.n} x {shared.k}", "blocks of 128 x 128")
    if isinstance(shared, PerGroup) and shared.size not in _GROUPS:
        return Rejected("granularity", f"groups of {shared.size} inputs", f"one of {', '.join(map(str, _GROUPS))}")
    if isinstance(shared, PerChannel | PerTensor) and (powers or weight.zero_points):
        return Rejected("granularity", weight.describe(), f"groups of one of {', '.join(map(str, _GROUPS))} inputs")
    return None


def _refuse_sizes(problem: LinearProblem) -> Rejected | None:
    sizes = (("in_features", problem.in_features), *(("out_features", s.out_features) for s in problem.segments))
    for name, size in sizes:
        if size < 1:
            return Rejected("shape", f"{name} is {size}", "at least 1")
    return None
