"""
Which mixtures of experts are run with x in float8_e4m3fn, and what they cost: known without a GPU and humming.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantplug.expertlimits import refuse_mixture
from quantplug.kernel import Accepted, Cast, Rejected, Verdict
from quantplug.rowlayout import shared_by
from quantplug.spec import ElementType, PerBlock, PerChannel, PerTensor
from quantplug_humming.expertfit import (
    MOST_EXPERTS,
    cost,
    extra_bytes,
    forms_of,
    mixture_casts,
    mixture_notes,
    products,
)
from quantplug_humming.fit import bytes_held, refuse

if TYPE_CHECKING:
    from quantplug.moe import MoEProblem
    from quantplug.platform import Platform

_ARCH = "9.0"
_ELEMENT = ElementType.FLOAT8_E4M3FN
_BLOCK = 128
_LONGEST_ROW = 1 << 14
"""Elements of x or h, a row of which one program quantizes at once."""

# One H100, see README.md: a call, bytes of a stream of weights, and products per microsecond.
_CALL_US = 22.0
_BYTES_PER_US = 2.9e6
_PRODUCTS_PER_US, _FAST_PRODUCTS_PER_US = 3.9e8, 4.7e8


def float8_verdict(problem: MoEProblem, platform: Platform, *, fast: bool) -> Verdict:
    """Return whether a mixture of experts is run on a platform with x in FP8, and at what cost."""
    refusal = refuse_mixture(problem, MOST_EXPERTS) or _refuse_elements(problem)
    for product in products(problem):
        refusal = refusal or refuse(product, platform)
    refusal = refusal or _refuse_arch(platform) or _refuse_activation(problem) or _refuse_scales(problem, fast=fast)
    refusal = refusal or _refuse_sizes(problem)
    if refusal is not None:
        return refusal
    forms = forms_of(problem, float8=True)
    one = sum(bytes_held(form) for form in forms)
    row = problem.top_k * one / (_FAST_PRODUCTS_PER_US if fast else _PRODUCTS_PER_US)
    return Accepted(
        cost(problem, _CALL_US, one / _BYTES_PER_US, row),
        casts=(Cast("long_accumulator" if fast else "accumulator", "float22_e8m13"), *mixture_casts(problem, forms)),
        extra_bytes=extra_bytes(problem, forms),
        notes=mixture_notes(forms),
        quantizes_x=True,
    )


def _refuse_elements(problem: MoEProblem) -> Rejected | None:
    for weight in (*problem.w13, problem.w2):
        if weight.element is not _ELEMENT:
            return Rejected("element", f"codes are {weight.element}", _ELEMENT)
    return None


def _refuse_arch(platform: Platform) -> Rejected | None:
    if platform.arch in ("", _ARCH):
        return None
    return Rejected("arch", f"compute capability {platform.arch}", f"its sums are known for {_ARCH} (Hopper)")


def _refuse_activation(problem: MoEProblem) -> Rejected | None:
    x = problem.activation
    if x is None:
        return Rejected("activation", "the file permits none", "a kernel that leaves x as it is")
    wanted = f"float8_e4m3fn, dynamic, per token or group {_BLOCK}"
    right = x.element is _ELEMENT and x.scale_dtype == "float32" and not x.global_scale
    shared = x.granularity == "token" or (x.granularity == "group" and x.group_size == _BLOCK)
    return None if right and shared and x.dynamic else Rejected("activation", f"x as {x.describe()}", wanted)


def _refuse_scales(problem: MoEProblem, *, fast: bool) -> Rejected | None:
    """Return why scales of weights do not go with those of x, of which each product takes one kind."""
    groups = problem.activation is not None and problem.activation.granularity == "group"
    for weight in (*problem.w13, problem.w2):
        if not isinstance(weight.granularity, PerBlock if groups else PerTensor | PerChannel):
            wanted = f"blocks of {_BLOCK} x {_BLOCK}" if groups else "one scale, or one per row"
            return Rejected("granularity", f"scales of {shared_by(weight)} for x per {_x_shared(groups)}", wanted)
    if groups and fast:
        return Rejected(
            "granularity", f"blocks of {_BLOCK} x {_BLOCK} are not added up fast", "one scale, or one per row"
        )
    return None


def _refuse_sizes(problem: MoEProblem) -> Rejected | None:
    blocks = isinstance(problem.w2.granularity, PerBlock)
    if blocks and len(problem.w13) > 1 and problem.intermediate % _BLOCK:
        what = f"intermediate {problem.intermediate}, so that up's blocks begin within one"
        return Rejected("shape", what, f"a multiple of {_BLOCK}")
    for name in ("hidden", "intermediate"):
        if getattr(problem, name) > _LONGEST_ROW:
            return Rejected("shape", f"{name} is {getattr(problem, name)}", f"at most {_LONGEST_ROW}")
    return None


def _x_shared(groups: bool) -> str:
    return f"group {_BLOCK}" if groups else "token"
