"""
Which mixtures of experts the kernel takes, which it refuses, and what they cost: known without a GPU.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantplug.kernel import Accepted, Cast, Cost, Rejected, Verdict
from quantplug.rowlayout import fill, refuse_codes, shared_by
from quantplug.spec import ElementType, PerChannel, PerTensor
from quantplug_cublas.fit import sums

if TYPE_CHECKING:
    from quantplug.moe import MoEProblem
    from quantplug.platform import Platform
    from quantplug.spec import WeightSpec

MOST_GROUPS = 1023
"""Groups that torch's grouped product takes."""

_ARCH = "9.0"
_FUNCTIONS = ("silu", "gelu", "gelu_tanh", "relu", "relu2")

# One H100, see README.md: a call, bytes of a stream of weights, and products per microsecond.
_CALL_US = 29.0
_BYTES_PER_US = 2.3e6
_PRODUCTS_PER_US, _FAST_PRODUCTS_PER_US = 3.1e8, 4.3e8


def experts_verdict(problem: MoEProblem, platform: Platform, *, fast: bool) -> Verdict:
    """Return whether the kernel runs a mixture of experts on a platform, and at what cost."""
    refusal = (
        _refuse_place(problem, platform)
        or _refuse_sizes(problem)
        or _refuse_function(problem)
        or _refuse_weights(problem)
        or _refuse_activation(problem)
    )
    if refusal is not None:
        return refusal
    held = bytes_held(problem)
    row = problem.top_k * held / problem.experts / (_FAST_PRODUCTS_PER_US if fast else _PRODUCTS_PER_US)
    one = held / problem.experts / _BYTES_PER_US
    # Few rows take an expert each; of many, every expert has its share, and its weights are read once.
    few = Cost(_CALL_US, problem.top_k * one + row, Cost(_CALL_US + problem.experts * one, row))
    return Accepted(
        few,
        casts=(sums(fast=fast), Cast("partials", "bfloat16")),
        extra_bytes=max(0, held - problem.stored_bytes),
        notes=("x is quantized twice, for gate and for up",) if turns(problem) > 1 else (),
        quantizes_x=True,
    )


def turns(problem: MoEProblem) -> int:
    """
    Return how often x is quantized: once, or for gate and up by themselves, where each has a stored scale of x.

    So often does the first product of an expert count as a group.
    """
    static = problem.activation is not None and not problem.activation.dynamic
    return len(problem.w13) if static else 1


def bytes_held(problem: MoEProblem) -> int:
    """Return the bytes of what `prepare` yields, without biases."""
    parts, hidden, between = len(problem.w13), fill(problem.hidden), fill(problem.intermediate)
    static = problem.activation is not None and not problem.activation.dynamic
    first = parts * between * (hidden + 4)
    second = hidden * (between + 4)
    return problem.experts * (first + second + (4 * (parts + 1) if static else 0))


def _refuse_place(problem: MoEProblem, platform: Platform) -> Rejected | None:
    if platform.kind != "cuda":
        return Rejected("platform", f"runs on cuda, not on {platform}")
    if platform.arch not in ("", _ARCH):
        fix = f"its sums are known for {_ARCH} (Hopper)"
        return Rejected("arch", f"compute capability {platform.arch}", fix)
    if problem.dtype != "bfloat16":
        return Rejected("dtype", f"activation dtype {problem.dtype}", "bfloat16, which torch's grouped product writes")
    return None


def _refuse_sizes(problem: MoEProblem) -> Rejected | None:
    for name in ("experts", "top_k", "hidden", "intermediate"):
        if getattr(problem, name) < 1:
            return Rejected("shape", f"{name} is {getattr(problem, name)}", "at least 1")
    groups = problem.experts * turns(problem)
    if groups > MOST_GROUPS:
        each = f", {turns(problem)} groups each" if groups > problem.experts else ""
        return Rejected("shape", f"{problem.experts} experts{each}", f"at most {MOST_GROUPS} groups on one device")
    if problem.router_weight_on_input and problem.top_k != 1:
        return Rejected("shape", f"top_k {problem.top_k} with the router's weight on the input", "top_k 1")
    return None


def _refuse_function(problem: MoEProblem) -> Rejected | None:
    if problem.function.name not in _FUNCTIONS:
        return Rejected("function", f"the function {problem.function.name}", f"one of {', '.join(_FUNCTIONS)}")
    if problem.function.gated != (len(problem.w13) == 2):
        return Rejected("segments", f"{len(problem.w13)} projections before {problem.function.describe()}")
    return None


def _refuse_weights(problem: MoEProblem) -> Rejected | None:
    for weight in dict.fromkeys((*problem.w13, problem.w2)):
        refusal = _refuse_weight(weight)
        if refusal is not None:
            return refusal
    return None


def _refuse_weight(weight: WeightSpec) -> Rejected | None:
    refusal = refuse_codes(weight, (ElementType.FLOAT8_E4M3FN,))
    if refusal is None and not isinstance(weight.granularity, PerTensor | PerChannel):
        return Rejected("granularity", f"scales of {shared_by(weight)}", "one scale, or one per row")
    return refusal


def _refuse_activation(problem: MoEProblem) -> Rejected | None:
    x = problem.activation
    if x is None:
        return Rejected("activation", "the file permits none", "a kernel that leaves x as it is")
    shared = (x.granularity, x.dynamic) in (("token", True), ("tensor", False))
    plain = x.scale_dtype == "float32" and not x.global_scale
    if x.element is not ElementType.FLOAT8_E4M3FN or not shared or not plain:
        wanted = "float8_e4m3fn per token, dynamic, or per tensor, static"
        return Rejected("activation", f"x as {x.describe()}", wanted)
    return None
