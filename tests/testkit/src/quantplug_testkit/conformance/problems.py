"""
The fixed, public catalogue of problems that kernels are tried on, each named after what goes wrong there.

A kernel is tried on those that its own `supports` accepts: claiming less in the test means being chosen less often.
"""

from __future__ import annotations

from dataclasses import dataclass
from zlib import crc32

import numpy as np
import torch

from quantplug.platform import Platform
from quantplug.spec import (
    ActivationSpec,
    ElementType,
    Granularity,
    LinearProblem,
    PerChannel,
    PerGroup,
    PerTensor,
    SegmentSpec,
    WeightSpec,
)
from quantplug.weight import ActivationParams, Weight
from quantplug_testkit.canonical import Scales, Zeros, make_weight

DTYPES = ("bfloat16", "float16", "float32")


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

    def activation(self) -> tuple[ActivationParams | None, ...]:
        """Return what the file stores about x, one per segment."""
        return (None,) * len(self.problem.segments)

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


def _weight(
    element: str,
    granularity: Granularity | int,
    *,
    act_order: bool = False,
    scale_dtype: str = "float16",
) -> WeightSpec:
    shared = PerGroup(granularity) if isinstance(granularity, int) else granularity
    return WeightSpec(ElementType(element), shared, scale_dtype, act_order)


def _hazards(
    family: str,
    out_features: int | tuple[int, ...],
    in_features: int,
    weight: WeightSpec | tuple[WeightSpec, ...],
    *,
    bias: bool = False,
    zeros: Zeros = "any",
    scales: Scales = "any",
) -> list[Hazard]:
    """A family: one problem in every dtype."""
    sizes = out_features if isinstance(out_features, tuple) else (out_features,)
    specs = weight if isinstance(weight, tuple) else (weight,) * len(sizes)
    segments = tuple(SegmentSpec(size, spec) for size, spec in zip(sizes, specs, strict=True))
    return [Hazard(family, LinearProblem(in_features, segments, dtype, bias), zeros, scales) for dtype in DTYPES]


_ONE_GROUP = PerChannel()

CATALOGUE: tuple[Hazard, ...] = (
    # every width, with and without zero points
    *(
        hazard
        for bits in (2, 3, 4, 8)
        for kind in ("int", "uint")
        for hazard in _hazards(f"{kind}{bits}-group32", 64, 128, _weight(f"{kind}{bits}", 32))
    ),
    # the sizes that tiled kernels like best, so that the pickiest kernel has something to run
    *_hazards("tiles-int4-group128", 256, 256, _weight("int4", 128)),
    *_hazards("tiles-uint4-group64", 256, 256, _weight("uint4", 64)),
    *_hazards("tiles-uint4-group64-act-order", 128, 256, _weight("uint4", 64, act_order=True)),
    *_hazards("tiles-int8-one-group", 128, 256, _weight("int8", _ONE_GROUP)),
    # one scale for everything, for a row, for all of K
    *_hazards("one-scale", 48, 96, _weight("int8", PerTensor())),
    *_hazards("one-group-int4", 64, 128, _weight("int4", _ONE_GROUP)),
    *_hazards("one-group-uint4", 64, 128, _weight("uint4", _ONE_GROUP)),
    *_hazards("one-group-int8", 48, 96, _weight("int8", _ONE_GROUP)),
    *_hazards("group-is-all-of-k", 64, 128, _weight("uint4", 128)),
    *_hazards("group-beyond-k", 64, 96, _weight("uint4", 128)),
    # the last group is short
    *_hazards("short-last-group", 64, 80, _weight("uint4", 32)),
    *_hazards("short-last-group-int8", 64, 112, _weight("int8", 32)),
    *_hazards("short-last-group-act-order", 64, 80, _weight("uint4", 32, act_order=True)),
    *_hazards("group-of-48-in-k-100", 32, 100, _weight("uint4", 48)),
    *_hazards("one-input-in-the-last-group", 32, 65, _weight("int4", 64)),
    # sizes no tile fits
    *_hazards("odd-n", 33, 64, _weight("uint4", 32)),
    *_hazards("n-beyond-a-tile", 129, 64, _weight("int4", 32)),
    *_hazards("one-output", 1, 64, _weight("uint4", 32)),
    *_hazards("odd-k", 32, 37, _weight("uint4", 16)),
    *_hazards("prime-n-and-k", 31, 61, _weight("uint3", 32)),
    *_hazards("tiny", 3, 5, _weight("uint4", 2)),
    # many groups, and a sum long enough for a short accumulator to show
    *_hazards("many-groups", 48, 576, _weight("uint4", 16)),
    *_hazards("long-sum", 32, 1536, _weight("int4", 128)),
    # act-order
    *_hazards("act-order", 64, 128, _weight("int4", 32, act_order=True)),
    *_hazards("act-order-uint4", 64, 128, _weight("uint4", 32, act_order=True)),
    *_hazards("act-order-int8", 48, 96, _weight("int8", 32, act_order=True)),
    # zero points at both ends, where adding one wraps
    *(
        hazard
        for bits in (2, 3, 4, 8)
        for end in ("lowest", "highest")
        for hazard in _hazards(f"zeros-{end}-uint{bits}", 32, 64, _weight(f"uint{bits}", 32), zeros=end)
    ),
    *_hazards("zeros-in-the-middle", 64, 128, _weight("uint4", 32), zeros="middle"),
    # scales
    *_hazards("scales-some-zero", 64, 128, _weight("uint4", 32), scales="some zero"),
    *_hazards("scales-negative", 64, 128, _weight("int4", 32), scales="negative"),
    *_hazards("scales-spread", 64, 128, _weight("uint4", 32), scales="spread"),
    *_hazards("scales-in-bfloat16", 64, 128, _weight("uint4", 32, scale_dtype="bfloat16")),
    *_hazards("scales-in-float32", 64, 128, _weight("uint4", 32, scale_dtype="float32")),
    # bias
    *_hazards("bias", 64, 128, _weight("uint4", 32), bias=True),
    *_hazards("bias-odd-n", 33, 64, _weight("int8", 32), bias=True),
    *_hazards("bias-act-order", 64, 128, _weight("int4", 32, act_order=True), bias=True),
    # fused layers: equal shards, unequal shards, one permutation each, different formats
    *_hazards("fused", (64, 32, 32), 128, _weight("int4", 32)),
    *_hazards("fused-bias", (64, 32, 32), 128, _weight("uint4", 32), bias=True),
    *_hazards("fused-odd", (33, 7, 1), 64, _weight("uint4", 32)),
    *_hazards("fused-act-order", (64, 32), 128, _weight("uint4", 32, act_order=True)),
    *_hazards(
        "fused-different-formats",
        (48, 32, 16),
        96,
        (_weight("int4", 32), _weight("uint8", _ONE_GROUP), _weight("uint3", 48, act_order=True)),
    ),
)
"""Every family, in every dtype."""

_PLAIN = (SegmentSpec(64, _weight("uint4", 32)),)

UNUSUAL: tuple[LinearProblem, ...] = (
    LinearProblem(128, _PLAIN, "float64"),
    LinearProblem(128, _PLAIN, "float8_e4m3fn"),
    LinearProblem(128, _PLAIN, "int32"),
    LinearProblem(128, _PLAIN, "bfloat16", activation=ActivationSpec(ElementType.INT8, "token", dynamic=True)),
    LinearProblem(128, _PLAIN, "bfloat16", activation=ActivationSpec(ElementType.FLOAT8_E4M3FN, "group", True, 128)),
    LinearProblem(0, _PLAIN, "bfloat16"),
    LinearProblem(128, (SegmentSpec(0, _weight("uint4", 32)),), "bfloat16"),
    LinearProblem(1, (SegmentSpec(1, _weight("uint2", 1)),), "bfloat16"),
    LinearProblem(2**31, (SegmentSpec(2**20, _weight("int4", 128)),), "bfloat16"),
    LinearProblem(128, _PLAIN * 64, "bfloat16", bias=True),
    LinearProblem(7919, (SegmentSpec(7907, _weight("uint3", 61, act_order=True)),), "float16", bias=True),
    LinearProblem(128, (SegmentSpec(64, _weight("uint4", 32, scale_dtype="float8_e4m3fn")),), "bfloat16"),
)
"""Problems that a kernel is asked about and never has to run."""

PLATFORMS: tuple[Platform, ...] = tuple(
    Platform.parse(text)
    for text in (
        "cpu",
        "cpu:x86_64",
        "cpu:aarch64",
        "cuda",
        "cuda:8.0",
        "cuda:9.0",
        "cuda:12.0",
        "npu:910b",
        "xpu",
        "abacus:7",
    )
)
"""Platforms that a kernel is asked about, most of which are not at hand."""
