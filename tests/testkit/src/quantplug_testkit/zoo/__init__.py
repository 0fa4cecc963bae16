"""
Kernels broken on purpose, one fault each: what a test suite for kernels must be able to see.

Each says in its docstring what is wrong, and in `caught_by` which conformance tests find it. Point your own suite at
`ZOO`, too: a suite that has never failed shows nothing.
"""

from __future__ import annotations

from quantplug_testkit.zoo import calls, floats, inputs, promises, results, weights
from quantplug_testkit.zoo.broken import Broken, Misread

__all__ = ["ZOO", "Broken"]

ZOO: tuple[type[Broken], ...] = tuple(
    kind
    for module in (weights, floats, results, inputs, calls, promises)
    for kind in vars(module).values()
    if isinstance(kind, type) and issubclass(kind, Broken) and kind not in (Broken, Misread, inputs.Misquantizer)
)
"""Every broken kernel, to be instantiated without arguments."""
