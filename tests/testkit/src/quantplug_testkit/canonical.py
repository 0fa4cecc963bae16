"""
Canonical weights made to order, and the way from them to the oracles' plain numbers.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

from quantplug.spec import ElementType, PerBlock, PerChannel, PerGroup, PerTensor, WeightSpec, group_count
from quantplug.weight import Weight
from quantplug_testkit.oracles.canonical import Segment

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from quantplug_testkit.oracles.canonical import Floats

Zeros = Literal["any", "lowest", "highest", "middle"]
Scales = Literal["any", "some zero", "negative", "spread"]


def make_weight(
    spec: WeightSpec,
    out_features: int,
    in_features: int,
    generator: np.random.Generator,
    *,
    zeros: Zeros = "any",
    scales: Scales = "any",
) -> Weight:
    """
    Return a random weight that obeys a spec; both ends of the code range occur in it.

    Args:
        spec: the numeric contract; with `act_order` inputs are assigned to groups by a random permutation.
        out_features: N.
        in_features: K.
        generator: where randomness comes from.
        zeros: zero points: any value, all 0, all `2^bits - 1`, or all `2^(bits-1)`.
        scales: about 0.01; or every third one 0; or of either sign; or spread over powers of two from 1/16 to 16.
    """
    lowest, highest = code_range(spec.element)
    codes = generator.integers(lowest, highest, (out_features, in_features), endpoint=True)
    codes[0, 0], codes[-1, -1] = lowest, highest
    rows = 1 if isinstance(spec.granularity, PerTensor) else out_features
    shape = (rows, group_count(spec.granularity, in_features))
    g_idx = None
    if spec.act_order:
        g_idx = torch.from_numpy(generator.permutation(_groups(spec, in_features)).astype(np.int32))
    return Weight(
        codes=torch.from_numpy(codes).to(torch.int8 if spec.element.signed else torch.uint8),
        scales=_make_scales(scales, shape, generator).to(getattr(torch, spec.scale_dtype)),
        spec=spec,
        zeros=None if spec.element.signed else _make_zeros(zeros, shape, highest, generator),
        g_idx=g_idx,
    )


def code_range(element: ElementType) -> tuple[int, int]:
    """Return the lowest and the highest code of a type."""
    levels = 1 << element.bits
    return (-levels // 2, levels // 2 - 1) if element.signed else (0, levels - 1)


def segment_of(weight: Weight) -> Segment:
    """Return a weight as the oracle's plain numbers; every conversion is exact."""
    return Segment.of(
        codes=weight.codes.to("cpu", torch.int64).numpy(),
        scales=to_float64(weight.scales),
        zeros=None if weight.zeros is None else weight.zeros.to("cpu", torch.int64).numpy(),
        g_idx=None if weight.g_idx is None else weight.g_idx.cpu().numpy(),
        group_size=weight.spec.granularity.size if isinstance(weight.spec.granularity, PerGroup) else -1,
        bits=weight.spec.element.bits,
    )


def to_float64(tensor: torch.Tensor) -> Floats:
    """Return a tensor of any float dtype as float64 in NumPy, exactly."""
    return np.asarray(tensor.detach().to("cpu", torch.float64).numpy())


def copy_weight(weight: Weight) -> Weight:
    """Return a weight that shares no memory with the original; strides stay as they are."""
    return _map_tensors(weight, lambda tensor: tensor.clone(memory_format=torch.preserve_format))


def transposed_weight(weight: Weight) -> Weight:
    """Return the same weight on transposed memory, as formats that store `[K, N]` and `[G, N]` hand it over."""
    return _map_tensors(weight, lambda tensor: tensor.t().contiguous().t() if tensor.dim() == 2 else tensor.clone())


def _map_tensors(weight: Weight, change: Callable[[torch.Tensor], torch.Tensor]) -> Weight:
    return replace(
        weight,
        codes=change(weight.codes),
        scales=change(weight.scales),
        zeros=None if weight.zeros is None else change(weight.zeros),
        g_idx=None if weight.g_idx is None else change(weight.g_idx),
    )


def _groups(spec: WeightSpec, in_features: int) -> NDArray[np.int64]:
    match spec.granularity:
        case PerGroup(size=size) | PerBlock(k=size):
            return np.arange(in_features) // size
        case PerTensor() | PerChannel():
            return np.zeros(in_features, np.int64)


def _make_zeros(kind: Zeros, shape: tuple[int, int], highest: int, generator: np.random.Generator) -> torch.Tensor:
    match kind:
        case "any":
            points = generator.integers(0, highest, shape, endpoint=True)
        case "lowest":
            points = np.zeros(shape, np.int64)
        case "highest":
            points = np.full(shape, highest)
        case "middle":
            points = np.full(shape, (highest + 1) // 2)
    return torch.from_numpy(points).to(torch.uint8)


def _make_scales(kind: Scales, shape: tuple[int, int], generator: np.random.Generator) -> torch.Tensor:
    # a random significand, so that rounding a scale to fewer bits shows
    scales = generator.uniform(0.005, 0.02, shape)
    match kind:
        case "any":
            pass
        case "some zero":
            scales.reshape(-1)[::3] = 0
        case "negative":
            scales *= generator.choice([-1.0, 1.0], shape)
        case "spread":
            scales *= 2.0 ** generator.integers(-4, 4, shape, endpoint=True)
    return torch.from_numpy(scales)
