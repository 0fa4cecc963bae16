"""
Layers made to order for the tests of the CPU kernels.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from quantplug.kernel import Accepted, LinearKernel
from quantplug.platform import Platform
from quantplug.spec import ElementType, Granularity, LinearProblem, PerGroup, SegmentSpec, WeightSpec
from quantplug.weight import ActivationParams, Prepared, Weight
from quantplug_testkit.bounds import linear_bound
from quantplug_testkit.canonical import make_weight, segment_of, to_float64
from quantplug_testkit.compare import assert_within
from quantplug_testkit.oracles.linear import linear

CPU = Platform.parse("cpu")


def spec(
    element: str,
    granularity: Granularity | int,
    *,
    act_order: bool = False,
    scales: str = "float16",
    global_scale: bool = False,
) -> WeightSpec:
    """Return a contract; a number is a group size."""
    shared = PerGroup(granularity) if isinstance(granularity, int) else granularity
    return WeightSpec(ElementType(element), shared, scales, act_order, global_scale)


def problem(weight: WeightSpec, n: int | tuple[int, ...], k: int, dtype: str = "bfloat16", *, bias: bool = False):
    """Return a problem of one segment, or of several."""
    sizes = n if isinstance(n, tuple) else (n,)
    return LinearProblem(k, tuple(SegmentSpec(size, weight) for size in sizes), dtype, bias)


def weights(asked: LinearProblem, seed: int = 0) -> tuple[Weight, ...]:
    """Return random weights for a problem."""
    generator = np.random.default_rng(seed)
    return tuple(make_weight(s.weight, s.out_features, asked.in_features, generator) for s in asked.segments)


@dataclass(frozen=True)
class Layer:
    """A prepared layer and what it was made from."""

    kernel: LinearKernel
    problem: LinearProblem
    weights: tuple[Weight, ...]
    prepared: Prepared

    @classmethod
    def of(
        cls,
        kernel: LinearKernel,
        asked: LinearProblem,
        given: tuple[Weight, ...] | None = None,
        stored: tuple[ActivationParams | None, ...] | None = None,
    ) -> Layer:
        """Prepare a layer, with random weights unless some are given, and with what is stored about x, if anything."""
        given = weights(asked) if given is None else given
        stored = (None,) * len(given) if stored is None else stored
        return cls(kernel, asked, given, kernel.prepare(asked, given, stored, torch.device("cpu")))

    def inputs(self, rows: int, seed: int = 0) -> torch.Tensor:
        """Return x `[rows, K]`."""
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(rows, self.problem.in_features, generator=generator)
        return x.to(getattr(torch, self.problem.dtype))

    def check(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        """Assert that the product of x is within the bound that follows from what the kernel declares."""
        __tracebackhide__ = True
        verdict = self.kernel.supports(self.problem, CPU)
        assert isinstance(verdict, Accepted)
        segments = [segment_of(weight) for weight in self.weights]
        values = np.concatenate([segment.values() for segment in segments])
        rows, offset = to_float64(x), None if bias is None else to_float64(bias)
        bound = linear_bound(rows, segments, offset, self.problem.dtype, verdict.casts)
        y = self.kernel.apply(x, self.prepared, bias)
        assert_within(y, linear(rows, values, offset), bound, f"y for {len(x)} rows")


def with_scales(weight: Weight, scales: torch.Tensor) -> Weight:
    """Return a weight with other scales, its contract in their dtype."""
    dtype = str(scales.dtype).removeprefix("torch.")
    return replace(weight, scales=scales, spec=replace(weight.spec, scale_dtype=dtype))
