"""
Canonical weights made to order, and the way from them to the oracles' plain numbers.
"""

from __future__ import annotations

from dataclasses import fields, replace
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

from quantplug.spec import ElementType, PerBlock, PerChannel, PerGroup, PerTensor, WeightSpec, scale_shape
from quantplug.weight import Weight
from quantplug_testkit.oracles import floats
from quantplug_testkit.oracles.canonical import Segment

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from quantplug_testkit.oracles.canonical import Floats

Zeros = Literal["any", "lowest", "highest", "middle"]
Scales = Literal["any", "some zero", "negative", "spread", "tiny", "large"]

_POWERS_OF_TWO = "float8_e8m0fnu"
_SUBNORMAL = {"float16": 2.0**-24, "float8_e4m3fn": 2.0**-9}


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
    Return a random weight that obeys a spec.

    Both ends of the code range occur in it; floating-point codes are any finite ones, and where there is room the
    smallest subnormals and both zeros are among them.

    Args:
        spec: the numeric contract; with `act_order` inputs are assigned to groups by a random permutation.
        out_features: N.
        in_features: K.
        generator: where randomness comes from.
        zeros: zero points: any value, all 0, all `2^bits - 1`, or all `2^(bits-1)`.
        scales: values of a size that layers have; or every third one 0; or of either sign; or spread over powers of two
            from 1/16 to 16; or the smallest of the dtype (about 2^-60 for bfloat16 and float32, whose smallest are
            below what a product shows); or so large that values just fit into float16, if the dtype goes so far.
            float8_e8m0fnu has no zero and no sign, and is spread instead.
    """
    element = spec.element
    shape = scale_shape(spec.granularity, out_features, in_features)
    g_idx = None
    if spec.act_order:
        g_idx = torch.from_numpy(generator.permutation(_groups(spec, in_features)).astype(np.int32))
    global_scale = None
    codes = _make_codes(element, (out_features, in_features), generator)
    numbers = _make_scales(scales, spec, shape, generator)
    points = None if element.signed else _make_zeros(zeros, shape, code_range(element)[1], generator)
    if spec.global_scale:
        global_scale = torch.tensor(generator.uniform(0.005, 0.02), dtype=torch.float32)
    return Weight(
        codes=codes,
        scales=torch.from_numpy(numbers).to(getattr(torch, spec.scale_dtype)),
        spec=spec,
        zeros=points,
        g_idx=g_idx,
        global_scale=global_scale,
    )


def code_range(element: ElementType) -> tuple[int, int]:
    """Return the lowest and the highest code of an integer type."""
    levels = 1 << element.bits
    return (-levels // 2, levels // 2 - 1) if element.signed else (0, levels - 1)


def code_numbers(weight: Weight) -> Floats:
    """Return what the codes of a weight stand for, float64 `[N, K]`, floating-point ones decoded by the oracle."""
    codes = weight.codes.cpu()
    if not weight.spec.element.floating:
        return np.asarray(codes.to(torch.float64).numpy())
    octets = codes if codes.dtype == torch.uint8 else codes.view(torch.uint8)
    return floats.decode(octets.numpy(), weight.spec.element)


def segment_of(weight: Weight) -> Segment:
    """Return a weight as the oracle's plain numbers; every conversion is exact."""
    granularity = weight.spec.granularity
    return Segment.of(
        codes=code_numbers(weight),
        scales=to_float64(weight.scales),
        zeros=None if weight.zeros is None else weight.zeros.to("cpu", torch.int64).numpy(),
        g_idx=None if weight.g_idx is None else weight.g_idx.cpu().numpy(),
        group_size=_inputs_per_scale(weight.spec, -1),
        bits=weight.spec.element.bits,
        block_rows=granularity.n if isinstance(granularity, PerBlock) else 1,
        global_scale=1.0 if weight.global_scale is None else float(weight.global_scale),
    )


def to_float64(tensor: torch.Tensor) -> Floats:
    """Return a tensor of any float dtype as float64 in NumPy, exactly; narrow ones are decoded by the oracle."""
    here = tensor.detach().cpu()
    name = str(here.dtype).removeprefix("torch.")
    if name in floats.FORMATS:
        return floats.decode(here.view(torch.uint8).numpy(), name)
    return np.asarray(here.to(torch.float64).numpy())


def copy_weight(weight: Weight) -> Weight:
    """Return a weight that shares no memory with the original; strides stay as they are."""
    return _map_tensors(weight, lambda tensor: tensor.clone(memory_format=torch.preserve_format))


def transposed_weight(weight: Weight) -> Weight:
    """Return the same weight on transposed memory, as formats that store `[K, N]` and `[G, N]` hand it over."""
    return _map_tensors(weight, lambda tensor: tensor.t().contiguous().t() if tensor.dim() == 2 else tensor.clone())


def weight_tensors(weight: Weight) -> dict[str, torch.Tensor]:
    """Return the tensors that a weight holds, by name."""
    found = {field.name: getattr(weight, field.name) for field in fields(weight)}
    return {name: value for name, value in found.items() if isinstance(value, torch.Tensor)}


def _map_tensors(weight: Weight, change: Callable[[torch.Tensor], torch.Tensor]) -> Weight:
    changed = {name: change(tensor) for name, tensor in weight_tensors(weight).items()}
    return replace(weight, **changed)  # type: ignore[arg-type]


def _inputs_per_scale(spec: WeightSpec, all_of_them: int) -> int:
    match spec.granularity:
        case PerGroup(size=size) | PerBlock(k=size):
            return size
        case PerTensor() | PerChannel():
            return all_of_them


def _groups(spec: WeightSpec, in_features: int) -> NDArray[np.int64]:
    return np.arange(in_features) // _inputs_per_scale(spec, in_features)


def _make_codes(element: ElementType, shape: tuple[int, int], generator: np.random.Generator) -> torch.Tensor:
    if not element.floating:
        lowest, highest = code_range(element)
        codes = generator.integers(lowest, highest, shape, endpoint=True)
        codes[0, 0], codes[-1, -1] = lowest, highest
        return torch.from_numpy(codes).to(torch.int8 if element.signed else torch.uint8)
    table = floats.values(element)
    finite = np.isfinite(table)
    half, highest = table.size // 2, int(np.argmax(np.where(finite, table, -np.inf)))
    drawn = generator.choice(np.flatnonzero(finite).astype(np.uint8), shape)
    flat = drawn.reshape(-1)
    flat[0], flat[-1] = half + highest, highest
    # the smallest subnormals, 0 and, where the format has it, -0
    small = [code for code in (1, half + 1, 0, half) if finite[code]]
    if flat.size > len(small) + 2:
        flat[1 : 1 + len(small)] = small
    octets = torch.from_numpy(drawn)
    return octets if element is ElementType.FLOAT4_E2M1FN else octets.view(getattr(torch, element))


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


def _make_scales(kind: Scales, spec: WeightSpec, shape: tuple[int, int], generator: np.random.Generator) -> Floats:
    dtype = spec.scale_dtype
    if dtype == _POWERS_OF_TWO:
        return _make_powers(kind, spec, shape, generator)
    # a random significand, so that rounding a scale to fewer bits shows
    scales: Floats = generator.uniform(0.005, 0.02, shape) * _typical(spec)
    match kind:
        case "any":
            pass
        case "some zero":
            scales.reshape(-1)[::3] = 0
        case "negative":
            scales *= generator.choice([-1.0, 1.0], shape)
        case "spread":
            scales *= 2.0 ** generator.integers(-4, 4, shape, endpoint=True)
        case "tiny" if dtype in _SUBNORMAL:
            scales = generator.integers(1, 7, shape, endpoint=True).astype(np.float64) * _SUBNORMAL[dtype]
        case "tiny":
            scales *= 2.0**-60
        case "large":
            scales = generator.uniform(1.0, 1.75, shape) * 2.0 ** min(_headroom(spec), 8)
    return scales


def _make_powers(kind: Scales, spec: WeightSpec, shape: tuple[int, int], generator: np.random.Generator) -> Floats:
    match kind:
        case "any":
            exponents = generator.integers(-8, -5, shape, endpoint=True) + int(np.log2(_typical(spec)))
        case "tiny":
            exponents = generator.integers(-127, -126, shape, endpoint=True)
            exponents[:, -1] = -127
        case "large":
            exponents = generator.integers(_headroom(spec) - 3, _headroom(spec), shape, endpoint=True)
        case "some zero" | "negative" | "spread":
            exponents = generator.integers(-12, 0, shape, endpoint=True)
    return 2.0 ** exponents.astype(np.float64)


def _typical(spec: WeightSpec) -> float:
    """A power of two that keeps values near those of layers: float8 codes may stand for large numbers."""
    if spec.scale_dtype == "float8_e4m3fn":
        # whose own values are near 1: it comes with a global scale
        return 64.0
    return float(min(1.0, 2.0 ** (7 - _largest_exponent(spec.element))))


def _headroom(spec: WeightSpec) -> int:
    """The exponent of a scale with which the largest code stands for a number just below 2^15."""
    return 13 - _largest_exponent(spec.element)


def _largest_exponent(element: ElementType) -> int:
    return floats.largest_exponent(element) if element.floating else element.bits - 1
