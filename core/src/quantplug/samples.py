"""
Weights and inputs made up for a problem, for measuring and for a first look at whether a kernel is right.

x consists of values that every permitted way to quantize it keeps exactly: codes of the permitted type times one power
of two, and the largest code wherever a scale is computed. So what is right is the same whether x is quantized or not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from quantplug.spec import ElementType, PerBlock, PerGroup, scale_shape
from quantplug.weight import ActivationParams, Weight

if TYPE_CHECKING:
    from collections.abc import Sequence

    from quantplug.spec import ActivationSpec, LinearProblem, WeightSpec

_STEP = 2.0**-6
"""What the codes of x are multiplied by."""

_LARGEST = {
    ElementType.INT8: 127.0, ElementType.UINT8: 127.0, ElementType.INT4: 7.0, ElementType.UINT4: 7.0,
    ElementType.FLOAT8_E4M3FN: 448.0, ElementType.FLOAT8_E5M2: 57344.0, ElementType.FLOAT8_E4M3FNUZ: 240.0,
    ElementType.FLOAT8_E5M2FNUZ: 57344.0, ElementType.FLOAT4_E2M1FN: 6.0,
}  # fmt: skip
_FLOAT4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_SPARSE_INPUTS = 32


def sample_weight(spec: WeightSpec, n: int, k: int, generator: torch.Generator) -> Weight:
    """Return a weight `[N, K]` on the CPU that obeys a contract: any codes, scales of a plausible size."""
    element = spec.element
    low, high = (0, 1 << element.bits) if not element.signed else (-(1 << element.bits - 1), 1 << element.bits - 1)
    if element is ElementType.FLOAT4_E2M1FN:
        codes = _integers(0, 16, (n, k), torch.uint8, generator)
    elif element.floating:
        # Without the two highest exponents, among whose codes are those that are not finite numbers.
        octets = _integers(0, 256, (n, k), torch.uint8, generator) & 0b1011_1111
        codes = octets.view(getattr(torch, element))
    else:
        codes = _integers(low, high, (n, k), torch.int8 if element.signed else torch.uint8, generator)
    shape = scale_shape(spec.granularity, n, k)
    if spec.scale_dtype == "float8_e8m0fnu":
        scales = _integers(118, 122, shape, torch.uint8, generator).view(torch.float8_e8m0fnu)
    else:
        # The scales of scales of 8 bits are near 1: they come with a global one.
        typical = 1.0 if spec.scale_dtype == "float8_e4m3fn" else 0.01
        scales = (torch.rand(shape, generator=generator) + 0.5).mul_(typical).to(getattr(torch, spec.scale_dtype))
    return Weight(
        codes,
        scales,
        spec,
        zeros=_integers(0, high, shape, torch.uint8, generator) if spec.zero_points else None,
        g_idx=_order(spec, k, generator) if spec.act_order else None,
        global_scale=torch.tensor(0.01) if spec.global_scale else None,
    )


def sample_activation(activation: ActivationSpec | None) -> ActivationParams | None:
    """Return what a file would store about the x of `sample_x`, None where it stores nothing."""
    if activation is None:
        return None
    wide = torch.tensor(_STEP) if activation.global_scale else None
    if activation.dynamic:
        return None if wide is None else ActivationParams(global_scale=wide)
    zero = torch.tensor(128, dtype=torch.uint8) if not activation.element.signed else None
    return ActivationParams(torch.tensor(_STEP), zero, wide)


def sample_x(problem: LinearProblem, rows: int, generator: torch.Generator) -> torch.Tensor:
    """
    Return x `[rows, K]` on the CPU in the problem's dtype.

    Rows are full and nearly empty in turns, the first being nearly empty: with few products in a sum, one that is wrong
    shows.
    """
    k, activation = problem.in_features, problem.activation
    element = ElementType.INT8 if activation is None else activation.element
    group = activation.group_size if activation is not None and activation.granularity == "group" else k
    largest = _LARGEST[element]
    codes = _codes(element, (rows, k), generator)
    codes[:, ::group] = largest
    apart = max(1, k // _SPARSE_INPUTS)
    for row in range(0, rows, 2):
        sparse = torch.zeros(k)
        sparse[(row // 2 + row) % apart :: apart] = largest
        codes[row] = sparse
    return codes.mul_(_STEP).to(getattr(torch, problem.dtype))


def sample_weights(problem: LinearProblem, generator: torch.Generator) -> list[Weight]:
    """Return a weight for every segment of a problem."""
    return [sample_weight(s.weight, s.out_features, problem.in_features, generator) for s in problem.segments]


def largest_code(element: ElementType) -> float:
    """Return the largest code of x in a type."""
    return _LARGEST[element]


def dense_values(weights: Sequence[Weight], device: torch.device) -> torch.Tensor:
    """Return the values float32 `[N, K]` of all segments on a device."""
    return torch.cat([weight.dequantize(torch.float32).to(device) for weight in weights])


def _codes(element: ElementType, shape: tuple[int, int], generator: torch.Generator) -> torch.Tensor:
    """Return codes of x as float32, none beyond the largest."""
    largest = int(_LARGEST[element])
    if element is ElementType.FLOAT4_E2M1FN:
        table = torch.tensor([*_FLOAT4, *(-value for value in _FLOAT4)])
        return table[torch.randint(0, 16, shape, generator=generator)]
    if element.floating:
        numbers = torch.randn(shape, generator=generator) * 32
        return numbers.clamp_(-largest, largest).to(getattr(torch, element)).to(torch.float32)
    return torch.randint(-largest, largest + 1, shape, generator=generator).to(torch.float32)


def _integers(
    low: int, high: int, shape: tuple[int, int], dtype: torch.dtype, generator: torch.Generator
) -> torch.Tensor:
    return torch.randint(low, high, shape, generator=generator, dtype=dtype)


def _order(spec: WeightSpec, k: int, generator: torch.Generator) -> torch.Tensor:
    """Return a g_idx that assigns inputs to their groups at random."""
    granularity = spec.granularity
    size = (
        granularity.size
        if isinstance(granularity, PerGroup)
        else granularity.k
        if isinstance(granularity, PerBlock)
        else k
    )
    return (torch.randperm(k, generator=generator) // size).to(torch.int32)
