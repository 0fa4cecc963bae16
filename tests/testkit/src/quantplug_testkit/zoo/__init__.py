"""
Kernels broken on purpose, one fault each: what a test suite for kernels must be able to see.

Each says in its docstring what is wrong, and in `caught_by` which conformance tests find it. Point your own suite at
`ZOO`, too: a suite that has never failed shows nothing.
"""

from __future__ import annotations

from quantplug_testkit.zoo import (
    calls,
    expert_calls,
    expert_derivatives,
    expert_functions,
    expert_promises,
    expert_routing,
    expert_weights,
    floats,
    inputs,
    promises,
    results,
    weights,
)
from quantplug_testkit.zoo.broken import Broken, Misread
from quantplug_testkit.zoo.broken_experts import BrokenExperts, MisledExperts, MisquantizingExperts, MisreadExperts

__all__ = ["EXPERT_ZOO", "ZOO", "Broken", "BrokenExperts"]

ZOO: tuple[type[Broken], ...] = tuple(
    kind
    for module in (weights, floats, results, inputs, calls, promises)
    for kind in vars(module).values()
    if isinstance(kind, type) and issubclass(kind, Broken) and kind not in (Broken, Misread, inputs.Misquantizer)
)
"""Every broken kernel for linear layers, to be instantiated without arguments."""

_BASES = (
    BrokenExperts,
    MisledExperts,
    MisreadExperts,
    MisquantizingExperts,
    expert_routing.Reroutes,
    expert_calls.Wrapped,
)

EXPERT_ZOO: tuple[type[BrokenExperts], ...] = tuple(
    kind
    for module in (expert_weights, expert_functions, expert_routing, expert_calls, expert_derivatives, expert_promises)
    for kind in vars(module).values()
    if isinstance(kind, type) and issubclass(kind, BrokenExperts) and kind not in _BASES
)
"""Every broken kernel for experts, to be instantiated without arguments."""
