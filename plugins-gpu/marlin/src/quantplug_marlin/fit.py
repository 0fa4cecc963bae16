"""
What the kernel takes, what it refuses, and what it costs: known without a GPU and without a compiler.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantplug.kernel import Accepted, Cost, Rejected, Verdict
from quantplug.spec import ElementType, PerGroup
from quantplug_marlin.form import HELD_SCALES, SCALE_BYTES, form_of
from quantplug_marlin.slots import STEP, arrange_in_order, group_size

if TYPE_CHECKING:
    from quantplug.platform import Platform
    from quantplug.spec import LinearProblem
    from quantplug_marlin.slots import Slots

DTYPES = ("bfloat16", "float16")

_OLDEST, _RUN = (8, 0), (9, 0)
_TILE = 16
_MOST_SLOTS = 4
"""Slots per input from which on so many are empty that the layout makes no sense."""

# One H100: bytes per microsecond of a stream of weights, a call, and products of a weight and a row per microsecond.
BYTES_PER_US = 2.9e6
PRODUCTS_PER_US = {True: 3.7e8, False: 3.4e8}
"""Whether products are just added up; else sums of groups are scaled."""
CALL_US = 2.0


def verdict(problem: LinearProblem, platform: Platform) -> Verdict:
    """Return whether the kernel runs a problem on a platform, and at what cost."""
    refusal = refuse_place(problem.dtype, platform) or _refuse_weight(problem)
    if refusal is not None:
        return refusal
    weight, k, n = problem.segments[0].weight, problem.in_features, problem.out_features
    slots = arrange_in_order(weight.granularity, k, apart=weight.global_scale)
    if slots.count > _MOST_SLOTS * k + 64:
        size = group_size(weight.granularity, k)
        return Rejected(
            "granularity", f"groups of {size} inputs would be filled up to {slots.width}", f"groups of {STEP}"
        )
    held = _bytes_of(problem, slots)
    added_up = not slots.parts or weight.scale_dtype in {"float8_e8m0fnu", "float8_e4m3fn"}
    return Accepted(
        Cost(CALL_US + held / BYTES_PER_US, n * k / PRODUCTS_PER_US[added_up]),
        extra_bytes=max(0, held - problem.stored_bytes),
        notes=_notes(problem, platform, slots),
        dequantize_us=CALL_US + (held + 2 * n * k) / BYTES_PER_US,
    )


def version_of(platform: Platform) -> tuple[int, ...]:
    """Return the compute capability, () where it was not said."""
    return tuple(int(part) for part in platform.arch.split(".") if part.isdecimal())


def _notes(problem: LinearProblem, platform: Platform, slots: Slots) -> tuple[str, ...]:
    weight, k = problem.segments[0].weight, problem.in_features
    notes = ["x is gathered in the order of groups"] if weight.act_order else []
    if slots.count >= k + 64:
        notes.append(f"empty slots: {k} inputs are laid out as {slots.count}")
    return (*notes, *notes_on(platform))


def notes_on(platform: Platform) -> tuple[str, ...]:
    """Return what a plan is told of a GPU that no kernel here was run on."""
    return () if version_of(platform) in {(), _RUN} else (f"compute capability {platform.arch}: not run on hardware",)


def _bytes_of(problem: LinearProblem, slots: Slots) -> int:
    """Return the bytes of what `prepare` yields; act-order is taken to fill every group equally."""
    weight, k = problem.segments[0].weight, problem.in_features
    form = form_of(weight, problem.dtype, slots)
    apart = weight.act_order
    parts = [[s.out_features] for s in problem.segments] if apart else [[s.out_features for s in problem.segments]]
    filled = slots.groups > 1 and slots.width != group_size(weight.granularity, k)
    moved = slots.width and (weight.act_order or filled)
    total = 0
    for part in parts:
        tiles = -(-sum(part) // _TILE)
        total += tiles * _TILE * slots.count * form.bits // 8
        if slots.width:
            total += tiles * _TILE * slots.groups * (SCALE_BYTES[form.scale] + form.zeros)
        else:
            total += tiles * _TILE * form.zeros
        total += 0 if slots.width and not weight.global_scale else 4 * sum(part)
        total += 4 * slots.count if moved else 0
    return total


def refuse_place(dtype: str, platform: Platform) -> Rejected | None:
    """Return why a platform, or the dtype of x, is none of this plugin's."""
    if platform.kind != "cuda":
        return Rejected("platform", f"runs on cuda, not on {platform}")
    if platform.arch.startswith("gfx"):
        return Rejected("arch", f"{platform.arch} is an AMD GPU, and the kernels are CUDA C++", "triton.wna16")
    version = version_of(platform)
    if version and version < _OLDEST:
        return Rejected("arch", f"compute capability {platform.arch}", "8.0 or newer")
    if dtype not in DTYPES:
        return Rejected("dtype", f"activation dtype {dtype}", f"use one of {', '.join(DTYPES)}")
    return None


def _refuse_weight(problem: LinearProblem) -> Rejected | None:
    if not problem.uniform:
        kinds = " and ".join(dict.fromkeys(segment.weight.describe() for segment in problem.segments))
        return Rejected("segments", f"segments differ: {kinds}", "split the call, as the core does")
    weight = problem.segments[0].weight
    if weight.element is ElementType.FLOAT8_E5M2FNUZ and problem.dtype == "float16":
        # Its highest exponent is that of float16's infinities.
        return Rejected("element", f"codes are {weight.element}, whose largest are infinite in float16", "bfloat16")
    if weight.scale_dtype not in HELD_SCALES:
        return Rejected("dtype", f"scales in {weight.scale_dtype}", f"use one of {', '.join(HELD_SCALES)}")
    sizes = (("in_features", problem.in_features), *(("out_features", s.out_features) for s in problem.segments))
    for name, size in sizes:
        if size < 1:
            return Rejected("shape", f"{name} is {size}", "at least 1")
    if isinstance(weight.granularity, PerGroup) and weight.granularity.size < 1:
        return Rejected("granularity", f"group size {weight.granularity.size}", "at least 1")
    return None
