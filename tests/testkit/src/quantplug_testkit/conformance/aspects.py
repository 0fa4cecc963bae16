"""
What about a hazard may matter to a kernel, so that a selection can cover it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantplug.spec import PerBlock, PerChannel, PerGroup, PerTensor

if TYPE_CHECKING:
    from collections.abc import Hashable

    from quantplug.spec import Granularity, WeightSpec
    from quantplug_testkit.conformance.hazard import Hazard

_LONG = 1024


def aspects_of(hazard: Hazard) -> dict[str, Hashable]:
    """Return the aspects of a linear layer, each with its value: dtype, types, sharing, values, sizes, segments."""
    problem = hazard.problem
    segments = problem.segments
    return {
        "dtype": problem.dtype,
        "elements": tuple(dict.fromkeys(segment.weight.element for segment in segments)),
        **aspects_of_weight(segments[0].weight, segments[0].out_features, problem.in_features),
        "zeros": hazard.zeros,
        "scales": hazard.scales,
        "bias": problem.bias,
        "activation": problem.activation,
        "segments": "one" if len(segments) == 1 else "alike" if problem.uniform else "unlike",
        "outputs": size_of(problem.out_features),
        "inputs": size_of(problem.in_features),
    }


def aspects_of_weight(spec: WeightSpec, rows: int, columns: int) -> dict[str, Hashable]:
    """Return the aspects of how a weight `[rows, columns]` is scaled."""
    return {
        "shared": _shared(spec.granularity),
        "fit": _fit(spec.granularity, rows, columns),
        "scale dtype": spec.scale_dtype,
        "global scale": spec.global_scale,
        "act-order": spec.act_order,
    }


def size_of(size: int) -> str:
    """Return what kind of number of rows or columns it is, to a kernel that works in vectors and tiles."""
    if size == 1:
        return "one"
    if size % 8:
        return "odd"
    if size >= _LONG:
        return "long"
    return "even" if size % 128 else "tiles"


def _shared(granularity: Granularity) -> str:
    match granularity:
        case PerTensor():
            return "tensor"
        case PerChannel():
            return "channel"
        case PerGroup(size=size):
            return f"group of {size_of(size)}"
        case PerBlock(n=n, k=k):
            return f"block of {size_of(n)} and {size_of(k)}"


def _fit(granularity: Granularity, rows: int, columns: int) -> str:
    match granularity:
        case PerGroup(size=size):
            n, k = 1, size
        case PerBlock(n=n, k=k):
            pass
        case _:
            return "whole"
    if n > rows or k > columns:
        return "beyond"
    return "ragged" if rows % n or columns % k else "even"
