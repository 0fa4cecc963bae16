"""The bound of experts' gradients: its exact values are derivatives of the oracle, and right kernels are within it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from quantplug.moe import ExpertFunction
from quantplug.platform import Platform
from quantplug.spec import ElementType, PerGroup, WeightSpec
from quantplug_testkit.canonical import to_float64
from quantplug_testkit.conformance.experts.case import ExpertCase
from quantplug_testkit.conformance.experts.hazard import family, oracle_layer
from quantplug_testkit.expertgradients import gradient_bound
from quantplug_testkit.oracles.experts import Function, mixture
from quantplug_testkit.plain_experts import PlainExperts

FUNCTIONS = {
    "silu": ExpertFunction("silu", alpha=1.5, up_offset=1.0),
    "gelu": ExpertFunction("gelu"),
    "gelu_tanh": ExpertFunction("gelu_tanh", gated=False),
    "relu": ExpertFunction("relu"),
    "relu2": ExpertFunction("relu2", gated=False),
}
SPEC = WeightSpec(ElementType.INT8, PerGroup(32), "float32")
ROWS = 5


def found(name: str, dtype: str):
    """A case, x, a routing, what is picked, and the bound."""
    [hazard] = [each for each in family(name, SPEC, function=FUNCTIONS[name], bias=True) if each.problem.dtype == dtype]
    case = ExpertCase(PlainExperts(), Platform.parse("cpu"), torch.device("cpu"), hazard)
    x, routing, picked = case.inputs(ROWS), case.route(ROWS), np.arange(ROWS) * 7 % hazard.problem.hidden
    layer = oracle_layer(hazard, quantizes_x=False)
    operands = to_float64(x), routing.factors(), routing.chosen(hazard.problem.experts)
    return case, x, routing, picked, (*operands, layer), gradient_bound(*operands, picked, layer, dtype, case.casts)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_exact_gradients_are_differences_of_the_oracle(name):
    """By central differences of 2^-14, whose own error is of the size of their square."""
    _, _, _, picked, (x, weights, chosen, layer), (exact, _) = found(name, "float32")
    step, every = 2.0**-14, np.arange(ROWS)
    for column in range(0, x.shape[1], 5):
        ends = [x + sign * step * (np.arange(x.shape[1]) == column) for sign in (1, -1)]
        above, below = (mixture(end, weights, chosen, layer)[every, picked] for end in ends)
        assert np.allclose((above - below) / (2 * step), exact[:, column], rtol=0, atol=step**2 * np.abs(exact).max())


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_right_kernel_is_within_and_the_bound_is_no_wider_than_what_it_measures(name, dtype):
    case, x, routing, picked, _, (exact, bound) = found(name, dtype)
    x.requires_grad_()
    case.apply(x, routing)[range(ROWS), picked].sum().backward()
    off = np.abs(to_float64(x.grad) - exact)
    assert (off <= bound).all()
    if name != "relu" or dtype == "float32":
        size = np.abs(exact).max()
        assert (bound.max() < size / 8) if dtype != "float32" else (bound.max() < size * 2**-10)


def test_a_function_that_no_rule_is_for_is_refused():
    *_, (x, weights, chosen, layer), _ = found("silu", "float32")
    other = type(layer)(layer.experts, Function("swish"))
    with pytest.raises(ValueError, match="no rule for swish"):
        gradient_bound(x, weights, chosen, np.zeros(ROWS, dtype=np.int64), other, "float32", ())
