"""
What the kernel takes, what it refuses, and what it costs: known without a GPU and without DeepGEMM.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantplug.kernel import Accepted, Cast, Cost, Rejected, Verdict
from quantplug.rowlayout import BLOCK, bytes_held, mode_of, refuse, shared_by, width

if TYPE_CHECKING:
    from quantplug.platform import Platform
    from quantplug.spec import LinearProblem

DTYPE = "bfloat16"
"""Of x and y: DeepGEMM writes products of blocks in no other."""

_ARCH = "9.0"

# One H100, see README.md: two launches, bytes of a stream of weights and products per microsecond.
_LAUNCHES_US = 4.0
_BYTES_PER_US = 2.8e6
_PRODUCTS_PER_US = 6.2e8


def verdict(problem: LinearProblem, platform: Platform) -> Verdict:
    """Return whether the kernel runs a problem on a platform, and at what cost."""
    refusal = _refuse_place(problem, platform) or refuse(problem) or _refuse_granularity(problem)
    if refusal is not None:
        return refusal
    held, k = bytes_held(problem), problem.in_features
    casts = [Cast("accumulator", "float22_e8m13")]
    if problem.bias:
        # DeepGEMM adds none: it is added to y.
        casts.append(Cast("partials", DTYPE))
    return Accepted(
        Cost(_LAUNCHES_US + held / _BYTES_PER_US, problem.out_features * k / _PRODUCTS_PER_US),
        casts=tuple(casts),
        extra_bytes=max(0, held - problem.stored_bytes),
        notes=(f"K is filled up to {width(problem)}",) if width(problem) != k else (),
        quantizes_x=True,
    )


def _refuse_place(problem: LinearProblem, platform: Platform) -> Rejected | None:
    if platform.kind != "cuda":
        return Rejected("platform", f"runs on cuda, not on {platform}")
    if platform.arch not in ("", _ARCH):
        return Rejected("arch", f"compute capability {platform.arch}", f"its sums are known for {_ARCH} (Hopper)")
    if problem.dtype != DTYPE:
        return Rejected("dtype", f"activation dtype {problem.dtype}", f"use {DTYPE}")
    return None


def _refuse_granularity(problem: LinearProblem) -> Rejected | None:
    if mode_of(problem) == "block":
        return None
    return Rejected("granularity", shared_by(problem.segments[0].weight), f"blocks of {BLOCK} x {BLOCK}")
