"""
What no kernel for experts can run, whatever its numbers: what every one of them would have to refuse.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, get_args

from quantplug.kernel import Rejected
from quantplug.moe import FunctionName

if TYPE_CHECKING:
    from quantplug.moe import MoEProblem

FUNCTIONS: tuple[FunctionName, ...] = get_args(FunctionName)
"""What may lie between the products, in an order that kernels may number them by."""


def refuse_mixture(problem: MoEProblem, most_experts: int | None = None) -> Rejected | None:
    """
    Return why no mixture of such sizes, or with such a function, is run, or None.

    Args:
        problem: what is asked.
        most_experts: that the kernel has room for, None for any number.
    """
    for name in ("experts", "top_k", "hidden", "intermediate"):
        if getattr(problem, name) < 1:
            return Rejected("shape", f"{name} is {getattr(problem, name)}", "at least 1")
    if most_experts is not None and problem.experts > most_experts:
        return Rejected("shape", f"{problem.experts} experts", f"at most {most_experts} on one device")
    if problem.router_weight_on_input and problem.top_k != 1:
        return Rejected("shape", f"top_k {problem.top_k} with the router's weight on the input", "top_k 1")
    if problem.function.name not in FUNCTIONS:
        return Rejected("function", f"the function {problem.function.name}", f"one of {', '.join(FUNCTIONS)}")
    if problem.function.gated != (len(problem.w13) == 2):
        kinds = " and ".join(spec.describe() for spec in problem.w13)
        what = f"{len(problem.w13)} projections, {kinds}, before {problem.function.describe()}"
        return Rejected("segments", what, "gate and up where there is a gate, up alone where there is none")
    return None
