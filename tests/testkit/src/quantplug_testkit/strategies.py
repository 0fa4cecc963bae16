"""
Hypothesis strategies for canonical weights, problems and inputs.

Sizes, formats and kinds are drawn, so that they shrink; the many numbers inside come from a drawn seed, which keeps a
failing example short to print and quick to replay.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, get_args

import numpy as np
import torch
from hypothesis import strategies as st

from quantplug.activations import read_activation
from quantplug.spec import (
    ElementType,
    Granularity,
    LinearProblem,
    PerBlock,
    PerChannel,
    PerGroup,
    PerTensor,
    SegmentSpec,
    WeightSpec,
)
from quantplug_testkit.activation import make_activation
from quantplug_testkit.canonical import Scales, Zeros, make_weight

if TYPE_CHECKING:
    from quantplug.spec import ActivationSpec
    from quantplug.weight import ActivationParams, Weight

DTYPES = ("bfloat16", "float16", "float32")

SCALE_DTYPES = (*DTYPES, "float8_e8m0fnu", "float8_e4m3fn")

PERMISSIONS = (
    "none",
    "int8/token/dynamic",
    "int8/tensor/dynamic",
    "int8/group32/dynamic",
    "int8/tensor/static",
    "uint8/tensor/static",
    "float8_e4m3fn/token/dynamic",
    "float8_e4m3fn/group128/dynamic",
    "float8_e4m3fn/tensor/static",
    "float8_e5m2/token/dynamic",
    "float8_e4m3fn/group32/dynamic/float8_e8m0fnu",
    "float4_e2m1fn/group32/dynamic/float8_e8m0fnu",
    "float4_e2m1fn/group16/dynamic/float8_e4m3fn+global",
)
"""What files permit about x, as `quantplug.activations` spells it: one of each kind that the oracle has a rule for."""


@dataclass(frozen=True, slots=True, eq=False)
class Layer:
    """A problem with weights, a bias, and what is stored about x, that fit it."""

    problem: LinearProblem
    weights: tuple[Weight, ...]
    bias: torch.Tensor | None
    activation: tuple[ActivationParams | None, ...]


def seeds() -> st.SearchStrategy[np.random.Generator]:
    """Generators of random numbers."""
    return st.integers(0, 2**32 - 1).map(np.random.default_rng)


def sizes(largest: int = 96) -> st.SearchStrategy[int]:
    """Numbers of features: small and odd ones, and those that words, groups and tiles like."""
    liked = [size for size in (1, 8, 16, 32, 64, 96, 128, 256) if size <= largest]
    return st.integers(1, largest) | st.sampled_from(liked)


def element_types(
    *, bits: tuple[int, ...] = (2, 3, 4, 8), signed: bool | None = None
) -> st.SearchStrategy[ElementType]:
    """Integer types of the given widths, signed, unsigned or (None) both."""
    kinds = (False, True) if signed is None else (signed,)
    return st.sampled_from([ElementType.integer(width, signed=kind) for width in bits for kind in kinds])


def float_types() -> st.SearchStrategy[ElementType]:
    """Floating-point types of codes."""
    return st.sampled_from([element for element in ElementType if element.floating])


def granularities(in_features: int) -> st.SearchStrategy[Granularity]:
    """One scale for all, for a row, for groups or for blocks, of any size: dividing N and K or not, and beyond them."""
    inputs = st.integers(1, in_features + 8) | st.sampled_from((16, 32, 64, 128, in_features))
    blocks = st.builds(PerBlock, st.integers(1, 40) | st.just(128), inputs)
    return st.just(PerTensor()) | st.just(PerChannel()) | inputs.map(PerGroup) | blocks


@st.composite
def weight_specs(
    draw: st.DrawFn,
    in_features: int,
    *,
    elements: st.SearchStrategy[ElementType] | None = None,
    scale_dtypes: tuple[str, ...] = SCALE_DTYPES,
) -> WeightSpec:
    """Numeric contracts of a weight with K inputs; act-order only where there are groups to order."""
    granularity = draw(granularities(in_features))
    return WeightSpec(
        element=draw(element_types() | float_types() if elements is None else elements),
        granularity=granularity,
        scale_dtype=draw(st.sampled_from(scale_dtypes)),
        act_order=isinstance(granularity, PerGroup) and draw(st.booleans()),
        global_scale=draw(st.booleans()),
    )


def permissions() -> st.SearchStrategy[ActivationSpec | None]:
    """What files say about quantizing x; None for no permission."""
    return st.sampled_from(PERMISSIONS).map(lambda text: read_activation(text, "permissions"))


@st.composite
def weights(draw: st.DrawFn, spec: WeightSpec, out_features: int, in_features: int) -> Weight:
    """Weights that obey a spec, with zero points and scales of a drawn kind."""
    return make_weight(
        spec,
        out_features,
        in_features,
        draw(seeds()),
        zeros=draw(st.sampled_from(get_args(Zeros))),
        scales=draw(st.sampled_from(get_args(Scales))),
    )


@st.composite
def any_weights(draw: st.DrawFn, largest: int = 96) -> Weight:
    """Weights of any size and format."""
    in_features = draw(sizes(largest))
    spec = draw(weight_specs(in_features))
    return draw(weights(spec, draw(sizes(largest)), in_features))


@st.composite
def problems(draw: st.DrawFn, *, largest: int = 96, most_segments: int = 3) -> LinearProblem:
    """Problems of one or more segments; those of a fused layer may share a format or not."""
    in_features = draw(sizes(largest))
    count = draw(st.integers(1, most_segments))
    shared = draw(weight_specs(in_features))
    uniform = draw(st.booleans())
    return LinearProblem(
        in_features=in_features,
        segments=tuple(
            SegmentSpec(draw(sizes(largest)), shared if uniform else draw(weight_specs(in_features)))
            for _ in range(count)
        ),
        dtype=draw(st.sampled_from(DTYPES)),
        bias=draw(st.booleans()),
        activation=draw(permissions()),
    )


@st.composite
def layers(draw: st.DrawFn, *, largest: int = 96, most_segments: int = 3) -> Layer:
    """Problems with weights, a bias, and what is stored about x."""
    problem = draw(problems(largest=largest, most_segments=most_segments))
    segments = tuple(
        draw(weights(segment.weight, segment.out_features, problem.in_features)) for segment in problem.segments
    )
    bias = draw(inputs((problem.out_features,), problem.dtype)) if problem.bias else None
    stored = tuple(make_activation(problem.activation, draw(seeds())) for _ in problem.segments)
    return Layer(problem, segments, bias, stored)


@st.composite
def inputs(draw: st.DrawFn, shape: tuple[int, ...], dtype: str, *, finite: bool = True) -> torch.Tensor:
    """
    Tensors of a float dtype: standard normal, with up to four elements replaced by special values.

    Args:
        draw: given by Hypothesis.
        shape: of the tensor.
        dtype: torch name.
        finite: whether NaN and the infinities are left out.
    """
    kind: torch.dtype = getattr(torch, dtype)
    values = torch.from_numpy(draw(seeds()).standard_normal(shape)).to(kind)
    info = torch.finfo(kind)
    tiny = info.smallest_normal
    special = [0.0, -0.0, 1.0, tiny, -tiny, tiny / 2, info.eps, 256.0, -4096.0]
    if not finite:
        special += [float("nan"), float("inf"), -float("inf")]
    flat = values.view(-1)
    for _ in range(draw(st.integers(0, min(4, flat.numel())))):
        flat[draw(st.integers(0, flat.numel() - 1))] = draw(st.sampled_from(special))
    return values
