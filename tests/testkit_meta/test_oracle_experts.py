"""The rules of a mixture of experts: worked by hand, and torch's own functions as witnesses."""

from __future__ import annotations

import doctest
import math

import numpy as np
import pytest
import torch

from quantplug_testkit.oracles import experts
from quantplug_testkit.oracles.activation import Rule
from quantplug_testkit.oracles.canonical import Segment
from quantplug_testkit.oracles.experts import Expert, Function, Layer, Stored, apply_function, locate, mixture, named


def weight(rows):
    """A weight whose values are given."""
    return Segment.of(rows, [[1.0]], None, None, -1, 8)


def row(*numbers):
    return np.array([numbers], np.float64)


def sigmoid(t):
    return 1 / (1 + math.exp(-t))


def test_the_worked_example_holds():
    """What the module's docstring shows is what it does."""
    assert doctest.testmod(experts).failed == 0


@pytest.mark.parametrize(
    ("function", "gate", "up", "expected"),
    [
        (Function("silu"), 2.0, 3.0, 2 * sigmoid(2.0) * 3),
        (Function("silu", limit=7.0, alpha=1.702, up_offset=1.0), 9.0, -8.0, 7 * sigmoid(7 * 1.702) * (-7 + 1)),
        (Function("silu", limit=7.0, alpha=1.702, up_offset=1.0), -9.0, 8.0, -9 * sigmoid(-9 * 1.702) * (7 + 1)),
        (Function("silu", alpha=2.0), -0.5, 1.0, -0.5 * sigmoid(-1.0)),
        (Function("gelu"), 1.0, 2.0, 2 * 0.8413447460685429),
        (Function("gelu_tanh"), 1.0, 2.0, 1 + math.tanh(math.sqrt(2 / math.pi) * 1.044715)),
        (Function("relu"), -1.0, 5.0, 0.0),
        (Function("relu2"), 3.0, 5.0, 45.0),
    ],
)
def test_gated_functions_by_hand(function, gate, up, expected):
    """Gate is bounded from above only, up from both sides, and its offset comes after that."""
    assert apply_function(row(gate, up), function)[0, 0] == pytest.approx(expected, rel=1e-14)


def test_without_a_gate_there_is_up_alone():
    """`f(up) = name(up)`: no limit, no offset."""
    plain = apply_function(row(-3.0, 2.0), Function("relu2", gated=False, limit=1.0, up_offset=1.0))
    assert plain.tolist() == [[0.0, 4.0]]


@pytest.mark.parametrize(
    ("name", "witness"),
    [
        ("silu", torch.nn.functional.silu),
        ("gelu", torch.nn.functional.gelu),
        ("gelu_tanh", lambda z: torch.nn.functional.gelu(z, approximate="tanh")),
        ("relu", torch.relu),
        ("relu2", lambda z: torch.relu(z).square()),
    ],
)
def test_torch_agrees_in_float64(name, witness):
    """Written by others, and compared over the range in which functions bend."""
    z = torch.linspace(-12, 12, 4001, dtype=torch.float64)
    found = named(z.numpy(), Function(name))
    np.testing.assert_allclose(found, witness(z).numpy(), rtol=1e-9, atol=1e-14)


def layer(**changes):
    """Three experts of one input, which multiply by 1, 2 and 3, then by 10."""
    made = tuple(Expert((weight([[code]]),), weight([[10]]), **changes) for code in (1, 2, 3))
    return Layer(made, Function("relu", gated=False))


def test_rows_go_where_ids_say_and_add_up():
    """Two experts of a row, each with its weight; an id of nobody; one that is named twice."""
    ids = np.array([[0, 2], [1, 3], [2, 2], [-1, 99]])
    weights = np.array([[1.0, 0.5], [2.0, 7.0], [1.0, 0.25], [5.0, 5.0]])
    assert mixture(np.ones((4, 1)), weights, ids, layer()).tolist() == [[10 + 15], [40], [37.5], [0]]


def test_biases_lie_before_the_function_and_before_the_routers_weight():
    """`r (10 relu(x + 1) + 4)`."""
    biased = layer(b13=np.array([1.0]), b2=np.array([4.0]))
    assert mixture(row(2.0), row(0.5), np.array([[0]]), biased).tolist() == [[0.5 * (10 * 3 + 4)]]


def test_a_weight_on_the_input_multiplies_x_alone():
    """`10 relu(r x + 1) + 4`."""
    biased = layer(b13=np.array([1.0]), b2=np.array([4.0]))
    on_input = Layer(biased.experts, biased.function, weight_on_input=True)
    assert mixture(row(2.0), row(0.5), np.array([[0]]), on_input).tolist() == [[10 * 2 + 4]]


def test_a_map_says_which_of_all_experts_are_here():
    """Ids are places in the map; what is not in it, or -1 there, is nobody's."""
    found = locate(np.array([[0, 1, 2, 3], [-1, 4, 99, 2]]), np.array([2, -1, 0, 1]))
    assert found.tolist() == [[2, -1, 0, 1], [-1, -1, -1, 0]]
    assert locate(np.array([[5]]), None).tolist() == [[5]]


def test_gate_and_up_lie_one_below_the_other():
    """Of x = (1, 2) gate is 1 + 2 = 3, up is 1 - 2 = -1; relu(3) * -1 = -3."""
    gated = Layer((Expert((weight([[1, 1]]), weight([[1, -1]])), weight([[1], [2]])),), Function("relu"))
    assert mixture(row(1.0, 2.0), row(1.0), np.array([[0]]), gated).tolist() == [[-3.0, -6.0]]


def test_what_enters_either_product_is_quantized_by_what_is_stored_for_it():
    """2.6 in steps of 1 is 3 for gate, and in steps of 2 it is 2 for up; h = 6 in steps of 4 is 8 (ties go to even)."""
    stored = {"stored13": (Stored(1.0), Stored(2.0)), "stored2": Stored(4.0)}
    expert = Expert((weight([[1]]), weight([[1]])), weight([[1]]), **stored)
    static = Layer((expert,), Function("relu"), Rule("int8", "tensor", False))
    assert mixture(row(2.6), row(1.0), np.array([[0]]), static).tolist() == [[8.0]]


def test_scales_of_a_token_are_those_of_the_rows_own_h():
    """127 and 2.4 become 127 and 2: the second expert input is quantized by its own largest magnitude."""
    expert = Expert((weight([[1, 0], [0, 1]]),), weight([[0, 1], [0, 1]]), stored13=(Stored(),))
    dynamic = Layer((expert,), Function("relu", gated=False), Rule("int8", "token", True))
    found = mixture(np.array([[127.0, 2.4], [12.7, 2.4]]), np.ones((2, 1)), np.zeros((2, 1), int), dynamic)
    assert found[:, 0] == pytest.approx([2.0, 2.4], rel=1e-12)
