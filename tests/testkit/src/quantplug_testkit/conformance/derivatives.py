"""
What traits promise of derivatives: gradients back to x, and tangents forward from it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from torch.autograd import forward_ad

from quantplug_testkit.bounds import (
    dequantize_roundings,
    gamma,
    linear_bound,
    stored_error,
    unit_roundoff,
    weight_error,
)
from quantplug_testkit.canonical import to_float64
from quantplug_testkit.compare import assert_within
from quantplug_testkit.conformance.case import Subject, oracle_segments, oracle_values
from quantplug_testkit.oracles.linear import linear

if TYPE_CHECKING:
    from quantplug_testkit.conformance.problems import Hazard


class DerivativeTests(Subject):
    """Of kernels that say so."""

    def test_gradients_reach_x(self, sample: Hazard) -> None:
        """Where the traits say differentiable, the gradient of one output is its row of W, as the dtype stores it."""
        if not self.kernel.traits.differentiable:
            pytest.skip(f"{self.kernel.name} says that it passes no gradients on")
        case, outputs = self.case(sample), sample.problem.out_features
        picked = sorted({0, outputs // 2, outputs - 1})
        for rows in (len(picked), 200):
            x = case.inputs(rows).requires_grad_()
            y = case.apply(x)
            assert y.requires_grad, f"y for {rows} rows has no gradient"
            wanted = torch.zeros_like(y)
            wanted[range(len(picked)), picked] = 1
            y.backward(wanted)
            assert x.grad is not None, f"x of {rows} rows is given no gradient"
            exact = oracle_values(sample)[picked]
            off = np.concatenate([weight_error(segment, case.casts) for segment in oracle_segments(sample)])[picked]
            roundings = 1 + max(dequantize_roundings(segment) for segment in oracle_segments(sample))
            off += gamma(roundings, unit_roundoff("float32")) * (np.abs(exact) + off)
            for _ in ("the value", "its product with 1"):
                off = stored_error(exact, off, sample.problem.dtype)
            assert_within(x.grad[: len(picked)], exact, off, f"the gradient of {rows} rows [{sample.name}]")
            assert not x.grad[len(picked) :].any(), "rows whose outputs are not wanted have a gradient"

    def test_tangents_reach_y(self, sample: Hazard) -> None:
        """Where the traits say tangents, that of y is that of x times W^T."""
        if not self.kernel.traits.tangents:
            pytest.skip(f"{self.kernel.name} says that it passes no tangents on")
        case = self.case(sample)
        for rows in (3, 200):
            x, direction = case.inputs(rows), case.inputs(rows, seed=1)
            with forward_ad.dual_level():
                tangent = forward_ad.unpack_dual(case.apply(forward_ad.make_dual(x, direction))).tangent
            assert tangent is not None, f"the tangent of {rows} rows is lost"
            given = to_float64(direction)
            bound = linear_bound(given, oracle_segments(sample), None, sample.problem.dtype, case.casts)
            assert_within(tangent, linear(given, oracle_values(sample)), bound, f"the tangent of {rows} rows")
