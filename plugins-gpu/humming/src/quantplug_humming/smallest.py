"""
Scales of 2^-127, the smallest that float8_e8m0fnu has: humming reads their byte, 0, as an exponent field, and so as 0.

Such a group is held with twice its scale and half of its codes. Half a code is a code, but for the smallest ones, whose
values are below 2^-126 either way: no normal float32, which a processor may take for 0.
"""

from __future__ import annotations

from functools import cache

import torch

from quantplug.codes import FLOAT4_E2M1FN_VALUES
from quantplug.spec import ElementType


def raise_smallest(
    codes: torch.Tensor, exponents: torch.Tensor, group: int, element: ElementType
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Return codes and scales none of which is 2^-127, the same tensors where none was.

    Args:
        codes: uint8 `[N, K]`, the bytes of float8_e4m3fn, or float4_e2m1fn codes.
        exponents: uint8 `[N, G]`, the bytes of the scales.
        group: inputs that share a scale.
        element: type of the codes.
    """
    smallest = exponents == 0
    if not bool(smallest.any()):
        return codes, exponents
    halves = _halves(element).to(codes.device)[codes.to(torch.int32)]
    everywhere = smallest.repeat_interleave(group, dim=1)[:, : codes.shape[1]]
    return torch.where(everywhere, halves, codes), exponents.clamp(min=1)


@cache
def _halves(element: ElementType) -> torch.Tensor:
    """Return the code of half of each code's value, rounded to nearest, to even."""
    if element is ElementType.FLOAT4_E2M1FN:
        values = torch.tensor(FLOAT4_E2M1FN_VALUES[:8])
        # what lies halfway between two codes goes to the even one
        nearest = (values[:, None] / 2 - values).abs() + torch.tensor([0.0, 2.0**-20]).repeat(4)
        positive = nearest.argmin(1)
        return torch.cat([positive, positive + 8]).to(torch.uint8)
    every = torch.arange(256, dtype=torch.uint8).view(getattr(torch, element))
    return (every.to(torch.float32) / 2).to(every.dtype).view(torch.uint8)
