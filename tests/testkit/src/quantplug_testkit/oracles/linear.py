"""
The product `y = x W^T + b` in float64, and the same product of magnitudes, which error bounds are made of.

A worked example, one row of two inputs and one output:

>>> linear(np.array([[1.0, 2.0]]), np.array([[3.0, -4.0]]), np.array([0.5])).tolist()
[[-4.5]]
>>> abs_linear(np.array([[1.0, 2.0]]), np.array([[3.0, -4.0]])).tolist()
[[11.0]]
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from quantplug_testkit.oracles.canonical import Floats

if TYPE_CHECKING:
    from collections.abc import Sequence


def linear(x: Floats, values: Floats, bias: Floats | None = None) -> Floats:
    """Return `[M, N]` for x `[M, K]`, values `[N, K]` and bias `[N]`, all float64 and finite."""
    product = _sum_of_products(x, values)
    return product if bias is None else product + bias


def fused_linear(inputs: Sequence[Floats], values: Sequence[Floats], bias: Floats | None = None) -> Floats:
    """Return `[M, N]` of a fused layer whose segments, values `[N_i, K]`, each have an x `[M, K]` of their own."""
    product = np.concatenate([_sum_of_products(x, each) for x, each in zip(inputs, values, strict=True)], axis=1)
    return product if bias is None else product + bias


def abs_linear(x: Floats, values: Floats) -> Floats:
    """Return `|x| |W|^T`, `[M, N]`: what every rounding error of the product is in proportion to."""
    return _sum_of_products(np.abs(x), np.abs(values))


def _sum_of_products(x: Floats, values: Floats) -> Floats:
    # not `@`: that starts threads, which a busy machine makes many times slower than the sums themselves
    sums: Floats = np.einsum("mk,nk->mn", x, values)
    return sums
