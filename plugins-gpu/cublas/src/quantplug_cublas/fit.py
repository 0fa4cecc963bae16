"""
What the kernel takes, what it refuses, and what it costs: known without a GPU.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantplug.kernel import Accepted, Cast, Cost, Rejected, Verdict
from quantplug.rowlayout import BLOCK, bytes_held, mode_of, refuse, width

if TYPE_CHECKING:
    from quantplug.platform import Platform
    from quantplug.spec import LinearProblem

DTYPES = ("bfloat16", "float16", "float32")

_ARCHS = {"8.9": "Ada", "9.0": "Hopper"}

# One H100, see benchmarks/gpu/README.md: bytes of a stream of weights and products per microsecond, two launches.
_BYTES_PER_US = 2.5e6
_PRODUCTS_PER_US, _FAST_PRODUCTS_PER_US = {"tensor": 6.6e8, "row": 6.6e8, "block": 5.6e8}, 7.2e8
_LAUNCHES_US = {"tensor": 4.0, "row": 6.1, "block": 10.0}


def sums(*, fast: bool) -> Cast:
    """Return how products are added up: in float32 every 128 inputs, or never."""
    return Cast("long_accumulator" if fast else "accumulator", "float22_e8m13")


def verdict(problem: LinearProblem, platform: Platform, *, fast: bool) -> Verdict:
    """Return whether the kernel runs a problem on a platform, and at what cost."""
    refusal = _refuse_place(problem, platform) or refuse(problem)
    if refusal is not None:
        return refusal
    mode, n, k = mode_of(problem), problem.out_features, problem.in_features
    if mode == "block" and platform.arch not in ("", "9.0"):
        return Rejected("arch", f"blocks of weights on compute capability {platform.arch}", "9.0 has products for them")
    if mode == "block" and fast:
        return Rejected(
            "granularity", f"blocks of {BLOCK} x {BLOCK} are not added up fast", "one scale, or one per row"
        )
    held, products_per_us = bytes_held(problem), _FAST_PRODUCTS_PER_US if fast else _PRODUCTS_PER_US[mode]
    notes = [f"K is filled up to {width(problem)}"] if width(problem) != k else []
    return Accepted(
        Cost(_LAUNCHES_US[mode] + held / _BYTES_PER_US, n * k / products_per_us),
        casts=(sums(fast=fast),),
        extra_bytes=max(0, held - problem.stored_bytes),
        notes=tuple(notes),
        quantizes_x=True,
    )


def _refuse_place(problem: LinearProblem, platform: Platform) -> Rejected | None:
    if platform.kind != "cuda":
        return Rejected("platform", f"runs on cuda, not on {platform}")
    if platform.arch and platform.arch not in _ARCHS:
        known = " and ".join(f"{arch} ({name})" for arch, name in _ARCHS.items())
        return Rejected("arch", f"compute capability {platform.arch}", f"its sums are known for {known}")
    if problem.dtype not in DTYPES:
        return Rejected("dtype", f"activation dtype {problem.dtype}", f"use one of {', '.join(DTYPES)}")
    return None
