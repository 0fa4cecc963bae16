"""
What about a layer of experts may matter to a kernel, so that a selection can cover it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantplug_testkit.conformance.aspects import aspects_of_weight, size_of

if TYPE_CHECKING:
    from collections.abc import Hashable

    from quantplug_testkit.conformance.experts.hazard import ExpertHazard


def aspects_of_experts(hazard: ExpertHazard) -> dict[str, Hashable]:
    """Return the aspects of a layer of experts, each with its value: those of its weights, its function, its router."""
    problem = hazard.problem
    return {
        "dtype": problem.dtype,
        "elements": tuple(dict.fromkeys(spec.element for spec in (*problem.w13, problem.w2))),
        **aspects_of_weight(problem.w13[0], problem.intermediate, problem.hidden),
        "zeros": hazard.zeros,
        "scales": hazard.scales,
        "exact": hazard.exact,
        "bias": problem.bias,
        "activation": problem.activation,
        "alike": len({*problem.w13, problem.w2}) == 1,
        "function": problem.function,
        "weight on input": problem.router_weight_on_input,
        "experts": size_of(problem.experts),
        "choices": "one" if problem.top_k == 1 else "all" if problem.top_k == problem.experts else "some",
        "hidden": size_of(problem.hidden),
        "intermediate": size_of(problem.intermediate),
    }
