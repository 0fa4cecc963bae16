"""
What the kernel for weights that lie row by row takes, and what it costs: known without a GPU and without a compiler.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantplug.kernel import Accepted, Cost, Verdict
from quantplug.rowlayout import bytes_held, mode_of, refuse, width
from quantplug_marlin.fit import BYTES_PER_US, CALL_US, PRODUCTS_PER_US, notes_on, refuse_place

if TYPE_CHECKING:
    from quantplug.platform import Platform
    from quantplug.spec import LinearProblem


def rows_verdict(problem: LinearProblem, platform: Platform) -> Verdict:
    """Return whether the kernel runs a problem on a platform, and at what cost."""
    refusal = refuse_place(problem.dtype, platform) or refuse(problem)
    if refusal is not None:
        return refusal
    held, k = bytes_held(problem), problem.in_features
    notes = [f"K is filled up to {width(problem)}"] if width(problem) != k else []
    return Accepted(
        Cost(CALL_US + held / BYTES_PER_US, problem.out_features * k / PRODUCTS_PER_US[mode_of(problem) != "block"]),
        extra_bytes=max(0, held - problem.stored_bytes),
        notes=(*notes, *notes_on(platform)),
    )
