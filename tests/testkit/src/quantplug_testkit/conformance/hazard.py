"""
One problem with weights that make a certain mistake show, and the maker of families of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from zlib import crc32

import numpy as np
import torch

from quantplug.activations import read_activation
from quantplug.spec import (
    ElementType,
    Granularity,
    LinearProblem,
    PerGroup,
    SegmentSpec,
    WeightSpec,
)
from quantplug.weight import ActivationParams, Weight
from quantplug_testkit.activation import make_activation
from quantplug_testkit.canonical import Scales, Zeros, make_weight
from quantplug_testkit.conformance.platforms import DTYPES


@dataclass(frozen=True, slots=True)
class Hazard:
    """
    One problem with weights that make a certain mistake show.

    Attributes:
        family: what can go wrong.
        problem: what the kernel is asked to run.
        zeros: which zero points the weights have, see `make_weight`.
        scales: which scales they have.
    """

    family: str
    problem: LinearProblem
    zeros: Zeros = "any"
    scales: Scales = "any"

    @property
    def name(self) -> str:
        """The family and the dtype."""
        return f"{self.family}-{self.problem.dtype}"

    def weights(self, seed: int = 0) -> tuple[Weight, ...]:
        """Return fresh weights, one per segment; the same for the same seed on every machine."""
        generator = self._generator(seed)
        return tuple(
            make_weight(
                segment.weight,
                segment.out_features,
                self.problem.in_features,
                generator,
                zeros=self.zeros,
                scales=self.scales,
            )
            for segment in self.problem.segments
        )

    def activation(self, seed: int = 0) -> tuple[ActivationParams | None, ...]:
        """Return what the file stores about x, one per segment, each its own; the same for the same seed."""
        generator = self._generator(1000 + seed)
        return tuple(make_activation(self.problem.activation, generator) for _ in self.problem.segments)

    def bias(self) -> torch.Tensor | None:
        """Return the bias `[N]` in the problem's dtype, or None when the problem has none."""
        if not self.problem.bias:
            return None
        return self._normal((self.problem.out_features,), 1)

    def inputs(self, rows: int, seed: int = 0) -> torch.Tensor:
        """Return x `[rows, K]` in the problem's dtype, standard normal."""
        return self._normal((rows, self.problem.in_features), 2 + seed)

    def _normal(self, shape: tuple[int, ...], seed: int) -> torch.Tensor:
        values = torch.from_numpy(self._generator(seed).standard_normal(shape))
        return values.to(getattr(torch, self.problem.dtype))

    def _generator(self, seed: int) -> np.random.Generator:
        return np.random.default_rng([crc32(self.name.encode()), seed])


def weight(
    element: str,
    granularity: Granularity | int,
    *,
    act_order: bool = False,
    scale_dtype: str = "float16",
    global_scale: bool = False,
) -> WeightSpec:
    """Return a numeric contract; a number as granularity is a group size."""
    shared = PerGroup(granularity) if isinstance(granularity, int) else granularity
    return WeightSpec(ElementType(element), shared, scale_dtype, act_order, global_scale)


def family(
    name: str,
    out_features: int | tuple[int, ...],
    in_features: int,
    spec: WeightSpec | tuple[WeightSpec, ...],
    *,
    bias: bool = False,
    activation: str = "none",
    zeros: Zeros = "any",
    scales: Scales = "any",
) -> list[Hazard]:
    """
    Return a family: one problem in every dtype.

    Args:
        name: what can go wrong.
        out_features: N, or that of each segment.
        in_features: K.
        spec: numeric contract of all segments, or of each.
        bias: whether there is one.
        activation: what the file permits, as `quantplug.activations` spells it.
        zeros: kind of zero points, see `make_weight`.
        scales: kind of scales.
    """
    sizes = out_features if isinstance(out_features, tuple) else (out_features,)
    specs = spec if isinstance(spec, tuple) else (spec,) * len(sizes)
    segments = tuple(SegmentSpec(size, each) for size, each in zip(sizes, specs, strict=True))
    permission = read_activation(activation, name)
    return [
        Hazard(name, LinearProblem(in_features, segments, dtype, bias, permission), zeros, scales) for dtype in DTYPES
    ]
