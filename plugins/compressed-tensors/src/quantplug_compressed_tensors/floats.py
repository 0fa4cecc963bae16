"""
Neighbours among floating-point numbers: which numbers round to a given one, and which of several has fewest bits.

Bits of positive floats, read as integers, are in the order of the numbers; so the next number is the next integer.
"""

from __future__ import annotations

import torch


def unit(dtype: torch.dtype) -> float:
    """Return the smallest positive number of a floating-point dtype."""
    limits = torch.finfo(dtype)
    return limits.smallest_normal * limits.eps


def following(numbers: torch.Tensor) -> torch.Tensor:
    """Return the next larger float32 of each number that is at least 0."""
    return (numbers.view(torch.int32) + 1).view(torch.float32)


def preceding(numbers: torch.Tensor) -> torch.Tensor:
    """Return the next smaller float32 of each positive number."""
    return (numbers.view(torch.int32) - 1).view(torch.float32)


def rounding_interval(numbers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Return the least and the greatest float32 whose magnitude rounds to that of each number, to nearest, ties to even.

    Those of a zero start at 0.

    Args:
        numbers: bfloat16, float16 or float32, finite.
    """
    exact = numbers.float().abs()
    if numbers.dtype == torch.float32:
        return exact, exact
    if numbers.dtype == torch.bfloat16:  # its bits are the upper half of float32's
        bits = exact.view(torch.int32)
        half = 0x8000 - (bits >> 16 & 1)
        return (bits - half).clamp_(min=0).view(torch.float32), (bits + half).view(torch.float32)
    bits = numbers.abs().view(torch.int16)
    below = exact - (bits - 1).clamp_(min=0).view(numbers.dtype).float()
    above = (bits + 1).view(numbers.dtype).float() - exact
    # Past the largest number lies infinity; the limit is where the next number would have been.
    above = torch.where(torch.isfinite(above), above, below)
    low, high = exact - below / 2, exact + above / 2  # exact: one bit more than the dtype has
    odd = (bits & 1).bool()
    return torch.where(odd, following(low), low), torch.where(odd, preceding(high), high)


def least_factor(products: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """
    Return the least float32 x at which `x * factor`, rounded to float32, is not below the product.

    Args:
        products: float32, positive.
        factors: float32, small positive integers, of the same shape.
    """
    x = preceding(products / factors)  # the quotient is rounded once: the answer is this, the next, or the one behind
    for _ in range(2):
        x = torch.where(x * factors >= products, x, following(x))
    return x


def greatest_factor(products: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """Return the greatest float32 x at which `x * factor`, rounded to float32, is not above the product."""
    x = following(products / factors)
    for _ in range(2):
        x = torch.where(x * factors <= products, x, preceding(x))
    return x


def simplest(low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """Return a float32 between two positive ones (both included) whose bits end in as many zeros as any there."""
    lowest, best = low.view(torch.int32), high.view(torch.int32)
    for zeros in range(1, 31):
        shorter = (best >> zeros) << zeros
        best = torch.where(shorter >= lowest, shorter, best)
    return best.view(torch.float32)
