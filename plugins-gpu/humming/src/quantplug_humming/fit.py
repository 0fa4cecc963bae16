"""
What the kernel takes, what it refuses, and what it costs: known without a GPU and without humming.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantplug.kernel import Accepted, Cast, Cost, Rejected, Verdict
from quantplug.spec import ElementType, PerBlock, PerChannel, PerGroup, PerTensor
from quantplug_humming.form import POWERS, Form, form_of

if TYPE_CHECKING:
    from quantplug.platform import Platform
    from quantplug.spec import LinearProblem, WeightSpec

DTYPE = "bfloat16"
"""Of x. In float16, sums of codes may leave its range before a scale brings them back."""

ELEMENTS = (
    ElementType.INT4, ElementType.UINT4, ElementType.INT8, ElementType.FLOAT8_E4M3FN, ElementType.FLOAT4_E2M1FN,
)  # fmt: skip
SCALES = ("float16", "bfloat16", "float32", POWERS)

_OLDEST = (8, 0)
_GROUPS = (32, 64, 128, 256)

_ORDER_BYTES = 4
"""Of each output of a layer with a bias: where it is in humming's order."""

# One H100, see benchmarks/gpu/README.md: bytes of a stream of weights and products per microsecond, one launch.
_BYTES_PER_US = 2.9e6
_PRODUCTS_PER_US = 3.7e8
_LAUNCH_US = 6.2


def verdict(problem: LinearProblem, platform: Platform) -> Verdict:
    """Return whether the kernel runs a problem on a platform, and at what cost."""
    refusal = refuse(problem, platform)
    if refusal is not None:
        return refusal
    form = form_of(problem)
    held = bytes_held(form) + (_ORDER_BYTES * form.filled[0] if problem.bias else 0)
    return Accepted(
        Cost(_LAUNCH_US + reading_us(form), row_us(form)),
        casts=casts(problem, form),
        extra_bytes=max(0, held - problem.stored_bytes),
        notes=notes(form),
    )


def casts(problem: LinearProblem, form: Form) -> tuple[Cast, ...]:
    """
    Return the roundings: where a row has several scales, weights are multiplied out in bfloat16, with scales in it; one
    scale per row multiplies sums in bfloat16, to which they were rounded, and so is a bias added. Any sum may be cut
    into parts that are added up in bfloat16.

    With x in float8_e4m3fn, scales of blocks multiply sums in float32, and no weight is multiplied out.
    """
    found: list[str] = []
    if not (form.single or form.powers or form.block or problem.segments[0].weight.scale_dtype == DTYPE):
        found.append("scales")
    if form.group and not form.powers and not form.float8:
        found.append("weights")
    if problem.bias or not (form.group or form.single):
        found.append("partials")
    return tuple(Cast(what, DTYPE) for what in (*found, "splits"))


def notes(form: Form) -> tuple[str, ...]:
    """Return what a plan should show."""
    rows, inputs = form.filled
    return () if (rows, inputs) == (form.outputs, form.inputs) else (f"filled up to [{rows}, {inputs}]",)


def bytes_held(form: Form) -> int:
    """Return the bytes of codes, scales and zero points as they are held."""
    rows, inputs = form.filled
    groups = inputs // (form.group or inputs)
    zeros = rows * groups // 2 if form.zeros else 0
    if form.single:
        scales = 4
    elif form.block:
        scales = 4 * rows // form.block * groups
    else:
        scales = rows * groups * (1 if form.powers else 2)
    return rows * inputs * form.bits // 8 + scales + zeros


def reading_us(form: Form) -> float:
    """Return the microseconds that reading a weight takes."""
    return bytes_held(form) / _BYTES_PER_US


def row_us(form: Form) -> float:
    """Return the microseconds that each row of x takes, in bfloat16."""
    rows, inputs = form.filled
    return rows * inputs / _PRODUCTS_PER_US


def refuse(problem: LinearProblem, platform: Platform) -> Rejected | None:
    """Return why the kernel does not run a problem on a platform, or None."""
    return _refuse_place(problem, platform) or _refuse_weight(problem)


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
    shared, powers = weight.granularity, weight.scale_dtype == POWERS
    if isinstance(shared, PerBlock) and (powers or (shared.n, shared.k) != (128, 128)):
        return Rejected("granularity", f"blocks of {shared.n} x {shared.k}", "blocks of 128 x 128")
    if isinstance(shared, PerGroup) and shared.size not in _GROUPS:
        return Rejected("granularity", f"groups of {shared.size} inputs", f"one of {', '.join(map(str, _GROUPS))}")
    alone = powers or weight.zero_points or weight.element is ElementType.FLOAT4_E2M1FN
    if isinstance(shared, PerChannel | PerTensor) and alone:
        return Rejected("granularity", weight.describe(), f"groups of one of {', '.join(map(str, _GROUPS))} inputs")
    return None


def _refuse_sizes(problem: LinearProblem) -> Rejected | None:
    sizes = (("in_features", problem.in_features), *(("out_features", s.out_features) for s in problem.segments))
    for name, size in sizes:
        if size < 1:
            return Rejected("shape", f"{name} is {size}", "at least 1")
    return None
