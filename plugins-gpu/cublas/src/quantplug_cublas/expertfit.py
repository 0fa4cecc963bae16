"""
Which mixtures of experts the kernel takes, which it refuses, and what they cost: known without a GPU.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantplug.expertrows import bytes_held, refuse, turns
from quantplug.kernel import Accepted, Cast, Cost, Rejected, Verdict
from quantplug_cublas.fit import sums

if TYPE_CHECKING:
    from quantplug.moe import MoEProblem
    from quantplug.platform import Platform

MOST_GROUPS = 1023
"""Groups that torch's grouped product takes."""

_ARCH = "9.0"

# One H100, see README.md: a call, bytes of a stream of weights, and products per microsecond.
_CALL_US = 29.0
_BYTES_PER_US = 2.3e6
_PRODUCTS_PER_US, _FAST_PRODUCTS_PER_US = 3.1e8, 4.3e8


def experts_verdict(problem: MoEProblem, platform: Platform, *, fast: bool) -> Verdict:
    """Return whether the kernel runs a mixture of experts on a platform, and at what cost."""
    refusal = _refuse_place(problem, platform) or refuse(problem) or _refuse_count(problem)
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


def _refuse_place(problem: MoEProblem, platform: Platform) -> Rejected | None:
    if platform.kind != "cuda":
        return Rejected("platform", f"runs on cuda, not on {platform}")
    if platform.arch not in ("", _ARCH):
        fix = f"its sums are known for {_ARCH} (Hopper)"
        return Rejected("arch", f"compute capability {platform.arch}", fix)
    if problem.dtype != "bfloat16":
        return Rejected("dtype", f"activation dtype {problem.dtype}", "bfloat16, which torch's grouped product writes")
    return None


def _refuse_count(problem: MoEProblem) -> Rejected | None:
    groups = problem.experts * turns(problem)
    if groups > MOST_GROUPS:
        each = f", {turns(problem)} groups each" if groups > problem.experts else ""
        return Rejected("shape", f"{problem.experts} experts{each}", f"at most {MOST_GROUPS} groups on one device")
    return None
