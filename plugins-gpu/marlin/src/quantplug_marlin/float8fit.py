"""
Which mixtures of experts are run with x in FP8 by this plugin's own product, and what they cost: known without a GPU.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantplug.expertrows import bytes_held, refuse
from quantplug.kernel import Accepted, Cast, Cost, Rejected, Verdict
from quantplug_marlin.expertfit import MOST_EXPERTS
from quantplug_marlin.fit import notes_on, refuse_place, version_of

if TYPE_CHECKING:
    from quantplug.moe import MoEProblem
    from quantplug.platform import Platform

LONGEST_ROW = 1 << 14
"""Elements of x or h, a row of which one block of threads quantizes at once."""

_ARCH = (9, 0)
# One H100, see README.md: a call, bytes of a stream of weights, and products per microsecond.
_CALL_US = 18.0
_BYTES_PER_US = 2.7e6
_PRODUCTS_PER_US = 5.4e8
_MOVED_PER_US = 6e6
"""Bytes that rows move beside weights; much of that lies in L2, or happens while others multiply."""


def float8_verdict(problem: MoEProblem, platform: Platform) -> Verdict:
    """Return whether a mixture of experts is run on a platform with x in FP8, and at what cost."""
    refusal = refuse_place(problem.dtype, platform) or _refuse_arch(platform)
    refusal = refusal or refuse(problem, MOST_EXPERTS) or _refuse_stored(problem) or _refuse_lengths(problem)
    if refusal is not None:
        return refusal
    held = bytes_held(problem)
    one = held / problem.experts
    row = problem.top_k * (one / _PRODUCTS_PER_US + _moved(problem) / _MOVED_PER_US)
    many = Cost(_CALL_US + held / _BYTES_PER_US, row)
    return Accepted(
        # Few rows take an expert each; of many, every expert has its share, and its weights are read once.
        Cost(_CALL_US, problem.top_k * one / _BYTES_PER_US + row, many),
        casts=(Cast("accumulator", "float22_e8m13"), Cast("gate_up", problem.dtype), Cast("expert", problem.dtype)),
        extra_bytes=max(0, held - problem.stored_bytes),
        notes=notes_on(platform),
        quantizes_x=True,
    )


def _moved(problem: MoEProblem) -> int:
    """
    Return the bytes that are read and written for each choice of a row: x as it comes and its codes, gate and up and
    the codes of h, and what an expert gives, which is added up.
    """
    return 8 * problem.hidden + (4 * len(problem.w13) + 2) * problem.intermediate


def _refuse_arch(platform: Platform) -> Rejected | None:
    if version_of(platform) in {(), _ARCH}:
        return None
    return Rejected("arch", f"compute capability {platform.arch}", "9.0, which has wgmma")


def _refuse_stored(problem: MoEProblem) -> Rejected | None:
    x = problem.activation
    if x is not None and not x.dynamic:
        return Rejected("activation", f"x as {x.describe()}", "float8_e4m3fn per token, dynamic")
    return None


def _refuse_lengths(problem: MoEProblem) -> Rejected | None:
    for name in ("hidden", "intermediate"):
        if getattr(problem, name) > LONGEST_ROW:
            return Rejected("shape", f"{name} is {getattr(problem, name)}", f"at most {LONGEST_ROW}")
    return None
