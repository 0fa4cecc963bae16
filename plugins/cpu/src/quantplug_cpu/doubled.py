"""
4-bit floating-point weights as integers: twice each code, and half of each scale.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from quantplug.codes import FLOAT4_E2M1FN_VALUES
from quantplug.spec import ElementType
from quantplug_cpu.checks import check_shapes

if TYPE_CHECKING:
    from quantplug.weight import Weight

_DOUBLED = torch.tensor([2 * value for value in FLOAT4_E2M1FN_VALUES], dtype=torch.int8)

_PIECE_WEIGHTS = 1 << 19

_LARGEST_SCALE = 2.0**122
"""The operator multiplies scales by 16 to reach the upper half of a code; more would pass the largest bfloat16."""


def doubled(weight: Weight) -> Weight:
    """
    Return the same weight with int8 codes and float32 scales, the global scale among them.

    Both are exact, but for the product with a global scale. A code of -0 becomes 0.

    Raises:
        ValueError: a tensor does not have the shape or dtype that the contract says, or a scale is too large.
    """
    check_shapes(weight, weight.in_features)
    scales = weight.scale_values() * 0.5
    largest = float(scales.abs().max())
    if not largest <= _LARGEST_SCALE:
        raise ValueError(f"the largest scale is {2 * largest:g}, more than {2 * _LARGEST_SCALE:g}")
    codes = torch.empty(weight.codes.shape, dtype=torch.int8)
    step = max(1, _PIECE_WEIGHTS // weight.in_features)
    for source, target in zip(weight.codes.split(step), codes.split(step), strict=True):
        torch.index_select(_DOUBLED, 0, source.reshape(-1).to(torch.int32), out=target.view(-1))
    spec = replace(weight.spec, element=ElementType.INT8, scale_dtype="float32", global_scale=False)
    return replace(weight, codes=codes, scales=scales, global_scale=None, spec=spec)
