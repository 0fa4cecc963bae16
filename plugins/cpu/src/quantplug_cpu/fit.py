"""
What the kernels ask of a problem before they look at its numbers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantplug.kernel import Cast, Rejected
from quantplug.spec import ElementType, PerBlock, PerGroup

if TYPE_CHECKING:
    from quantplug.platform import Platform
    from quantplug.spec import LinearProblem, WeightSpec

FAST_DTYPE = "bfloat16"
"""The dtype for which torch's packed operators are vectorised; in others they are scalar code, 20 times slower."""

MANY_ROWS = {1: 56, 2: 28}
"""Rows from which on dequantized tiles beat the packed operator, by nibbles per code; see benchmarks/README.md."""

PACKED_SCALES = {"float16": 2, "bfloat16": 2, "float32": 4}
"""Scale dtypes that the packed operators take, and their bytes."""

DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
"""Activation dtypes that are taken."""


def refuse_anywhere(problem: LinearProblem, platform: Platform) -> Rejected | None:
    """Return why no CPU kernel of this plugin runs the problem, whatever its numbers are, or None."""
    if platform.kind != "cpu":
        return Rejected("platform", f"runs on cpu, not on {platform}")
    if problem.dtype not in DTYPE_BYTES:
        return Rejected("dtype", f"activation dtype {problem.dtype}", f"use one of {', '.join(DTYPE_BYTES)}")
    sizes = (("in_features", problem.in_features), *(("out_features", s.out_features) for s in problem.segments))
    for name, size in sizes:
        if size < 1:
            return Rejected("shape", f"{name} is {size}", "at least 1")
    for segment in problem.segments:
        match segment.weight.granularity:
            case PerGroup(size=size) if size < 1:
                return Rejected("granularity", f"group size {size}", "at least 1")
            case PerBlock(n=n, k=k) if n < 1 or k < 1:
                return Rejected("granularity", f"blocks of {n} x {k}", "at least 1 x 1")
    return None


def refuse_unpacked(problem: LinearProblem, platform: Platform) -> Rejected | None:
    """Return why the packed operators do not run the problem, whatever its codes are, or None."""
    refusal = refuse_anywhere(problem, platform)
    if refusal is not None:
        return refusal
    if not problem.uniform:
        kinds = " and ".join(dict.fromkeys(segment.weight.describe() for segment in problem.segments))
        return Rejected("segments", f"segments differ: {kinds}", "split the call, as the core does")
    granularity = problem.segments[0].weight.granularity
    if isinstance(granularity, PerBlock):
        shared = f"{granularity.n} x {granularity.k}"
        return Rejected("granularity", f"scales are shared by blocks of {shared}", "cpu.dense takes them")
    return None


def refuse(problem: LinearProblem, platform: Platform, bits: tuple[int, ...], other: str) -> Rejected | None:
    """
    Return why the packed operators do not run a problem with integer codes, or None.

    Args:
        problem: what is to run.
        platform: what it is to run on.
        bits: widths of codes the kernel takes.
        other: name of the kernel for the other widths.
    """
    refusal = refuse_unpacked(problem, platform)
    if refusal is not None:
        return refusal
    weight = problem.segments[0].weight
    if weight.element.floating:
        other = "cpu.float4" if weight.element is ElementType.FLOAT4_E2M1FN else "cpu.dense"
        return Rejected("element", f"{weight.element} codes are floating-point numbers", f"{other} takes them")
    if weight.element.bits not in bits:
        return Rejected("element", f"{weight.element} has {weight.element.bits} bits", f"{other} takes it")
    if weight.scale_dtype not in PACKED_SCALES:
        return Rejected(
            "dtype", f"scales in {weight.scale_dtype}", f"use one of {', '.join(PACKED_SCALES)}, or cpu.dense"
        )
    if weight.global_scale:
        return Rejected("dtype", f"a global scale multiplies those in {weight.scale_dtype}", "cpu.dense takes it")
    return None


def packed_casts(weight: WeightSpec, *, bias: bool) -> tuple[Cast, ...]:
    """Return the roundings of the packed operator, and of the dequantized tiles that replace it for many rows."""
    casts = [] if _held_exactly(weight) else [Cast("scales", FAST_DTYPE)]
    if weight.zero_points:
        casts.append(Cast("zeros", FAST_DTYPE))
    casts.append(Cast("weights", FAST_DTYPE))
    if bias:
        casts.append(Cast("partials", FAST_DTYPE))
    return tuple(casts)


def _held_exactly(weight: WeightSpec) -> bool:
    """Return whether every scale that a weight can have is a number of `FAST_DTYPE`."""
    return weight.scale_dtype in (FAST_DTYPE, "float8_e8m0fnu", "float8_e4m3fn") and not weight.global_scale
