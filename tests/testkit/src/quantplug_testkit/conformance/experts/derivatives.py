"""
What traits promise of experts: gradients back to x and to the router's weights, and tangents forward from both.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from torch.autograd import forward_ad

from quantplug_testkit.canonical import to_float64
from quantplug_testkit.compare import assert_within
from quantplug_testkit.conformance.experts.case import ExpertSubject
from quantplug_testkit.conformance.experts.hazard import oracle_layer
from quantplug_testkit.expertbounds import mixture_bound
from quantplug_testkit.expertgradients import gradient_bound

if TYPE_CHECKING:
    from quantplug_testkit.conformance.experts.hazard import ExpertHazard


class ExpertDerivativeTests(ExpertSubject):
    """Of kernels that say so."""

    def test_gradients_reach_x_and_the_router(self, sample: ExpertHazard) -> None:
        """
        Where the traits say differentiable, so is every element of y: by a router's weight its derivative is what that
        expert gives, and by x the product of all derivatives between, as far as rules for both are there.
        """
        if not self.kernel.traits.differentiable:
            pytest.skip(f"{self.kernel.name} says that it passes no gradients on")
        case, problem = self.case(sample), sample.problem
        if case.quantizes_x or problem.router_weight_on_input or problem.function.limit is not None:
            pytest.skip(f"no rule says what gradients are right for {sample.name}")
        layer = oracle_layer(sample, quantizes_x=False)
        for rows in (3, 17):
            x, routing = case.inputs(rows).requires_grad_(), case.route(rows)
            weights = routing.weights.clone().requires_grad_()
            y = case.apply(x, replace(routing, weights=weights))
            assert y.requires_grad, f"y for {rows} rows has no gradient"
            every, picked = np.arange(rows), np.arange(rows) * 7 % problem.hidden
            wanted = torch.zeros_like(y)
            wanted[every, picked] = 1
            y.backward(wanted)
            assert x.grad is not None, f"x of {rows} rows is given no gradient"
            assert weights.grad is not None, f"the router's weights of {rows} rows are given no gradient"
            given, chosen = to_float64(x.detach()), routing.chosen(problem.experts)
            exact, bound = gradient_bound(given, routing.factors(), chosen, picked, layer, problem.dtype, case.casts)
            assert_within(x.grad, exact, bound, f"the gradient of {rows} rows [{sample.name}]")
            for slot in range(problem.top_k):
                one = chosen[:, slot : slot + 1]
                given_by, off = mixture_bound(given, np.ones((rows, 1)), one, layer, problem.dtype, case.casts)
                what = f"the gradient of the router's weights in slot {slot} of {rows} rows [{sample.name}]"
                assert_within(weights.grad[:, slot], given_by[every, picked], off[every, picked], what)

    def test_tangents_are_not_lost(self, sample: ExpertHazard) -> None:
        """Where the traits say tangents, y has one where x or the router's weights have: how large, no rule says."""
        if not self.kernel.traits.tangents:
            pytest.skip(f"{self.kernel.name} says that it passes no tangents on")
        case = self.case(sample)
        x, routing = case.inputs(3), case.route(3)
        for what in ("x", "the router's weights"):
            with forward_ad.dual_level():
                given, weights = x, routing.weights
                if what == "x":
                    given = forward_ad.make_dual(x, torch.ones_like(x))
                else:
                    weights = forward_ad.make_dual(weights, torch.ones_like(weights))
                y = case.apply(given, replace(routing, weights=weights))
                tangent = forward_ad.unpack_dual(y).tangent
            assert tangent is not None, f"the tangent of {what} is lost"
            assert tangent.any(), f"the tangent of {what} is 0"
