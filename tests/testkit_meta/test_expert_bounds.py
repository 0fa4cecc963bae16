"""The derived bound for experts: kernels that keep to what they declare stay inside, and little else does."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from quantplug.activations import read_activation
from quantplug.kernel import Accepted, Cast
from quantplug.moe import ExpertFunction
from quantplug.moeloop import LoopKernel
from quantplug.platform import Platform
from quantplug.reference import ReferenceKernel
from quantplug_testkit import expertbounds
from quantplug_testkit.bounds import gamma, stored_error
from quantplug_testkit.canonical import to_float64
from quantplug_testkit.compare import assert_within
from quantplug_testkit.conformance.experts import EXPERT_CATALOGUE
from quantplug_testkit.conformance.experts.case import ExpertCase
from quantplug_testkit.conformance.experts.hazard import oracle_layer
from quantplug_testkit.conformance.experts.routing import Routing
from quantplug_testkit.expert_strategies import expert_layers, functions, moderate_inputs, routings
from quantplug_testkit.expertbounds import function_error, mixture_bound, rounded_error
from quantplug_testkit.experts import expert_of
from quantplug_testkit.oracles import activation, floats
from quantplug_testkit.oracles.activation import Rule, quantize
from quantplug_testkit.oracles.canonical import Segment
from quantplug_testkit.oracles.experts import Expert, Function, Layer, apply_function, mixture, named
from quantplug_testkit.plain_experts import PlainExperts, QuantizingExperts
from quantplug_testkit.quantizing import QuantizingKernel

CPU = Platform.parse("cpu")
quick = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])

KERNELS = (PlainExperts(), LoopKernel(ReferenceKernel()), QuantizingExperts(), LoopKernel(QuantizingKernel()))


@given(st.data(), st.sampled_from(KERNELS), expert_layers(largest=24, most_experts=3))
@settings(quick, max_examples=80)
def test_a_kernel_that_keeps_its_word_stays_within(data, kernel, layer):
    """Any formats, sizes, functions, permissions and routings: what is declared is enough."""
    problem = layer.problem
    verdict = kernel.supports(problem, CPU)
    if not isinstance(verdict, Accepted):
        return
    x = data.draw(moderate_inputs((3, problem.hidden), problem.dtype))
    routing = Routing(*data.draw(routings(problem, 3)))
    prepared = kernel.prepare(problem, layer.experts, torch.device("cpu"))
    y = kernel.apply(x, routing.weights, routing.ids, prepared, routing.expert_map)
    plain = Layer(
        tuple(expert_of(each) for each in layer.experts),
        problem.function,
        problem.activation if verdict.quantizes_x else None,
        problem.router_weight_on_input,
    )
    exact, bound = mixture_bound(
        to_float64(x), routing.factors(), routing.chosen(problem.experts), plain, problem.dtype, verdict.casts
    )
    # what may overflow may become anything
    within = np.isfinite(bound)
    assert_within(to_float64(y)[within], exact[within], bound[within])


@given(functions(), st.integers(0, 2**32 - 1), st.sampled_from((0.0, 2.0**-20, 2.0**-8, 0.3)))
@settings(quick, max_examples=100)
def test_a_perturbed_product_stays_within_the_functions_error(function, seed, off):
    """Whatever lies within the product's own error gives an f within f's: in float64, on both sides of every bend."""
    generator = np.random.default_rng(seed)
    product = generator.standard_normal((4, 16)) * 4
    error = np.full_like(product, off)
    bound = function_error(product, error, function)
    for _ in range(20):
        moved = product + off * generator.choice([-1.0, 1.0, 0.0, generator.uniform(-1, 1)], product.shape)
        assert (np.abs(apply_function(moved, function) - apply_function(product, function)) <= bound).all()


@pytest.mark.parametrize("name", ["silu", "gelu", "gelu_tanh", "relu", "relu2"])
def test_functions_have_one_lowest_value(name):
    """They fall before it and rise behind it, which is what the ends of an interval are enough for."""
    z = np.linspace(-30, 30, 60001)
    steps = np.diff(named(z, Function(name, gated=False)))
    lowest_at = expertbounds._LOWEST_AT.get(name, 0.0)
    assert (steps[z[:-1] > lowest_at] > 0).all()
    assert (steps[z[1:] < lowest_at] <= 0).all()


@pytest.mark.parametrize("name", ["silu", "gelu", "gelu_tanh", "relu", "relu2"])
def test_float32_evaluations_are_within_and_eleven_bits_are_not(name):
    """The definition by torch's operators, over a wide range; a product that is known leaves nothing but evaluation."""
    function = ExpertFunction(name, gated=False, alpha=1.702)
    z = torch.cat([torch.linspace(-100, 100, 4001), torch.linspace(-6, 6, 4000)])[None].float()
    exact = apply_function(to_float64(z), function)
    bound = stored_error(exact, function_error(to_float64(z), np.zeros_like(exact), function), "float32")
    found = PlainExperts().between(z, function)
    assert_within(found, exact, bound)
    if name.startswith(("silu", "gelu")):
        with pytest.raises(AssertionError, match="leave the bound"):
            assert_within(z * (found / z).half().float().nan_to_num(), exact, bound)


def one(code, scale=1.0):
    """A weight of a single value."""
    return Segment.of([[code]], [[scale]], None, None, -1, 8)


def test_the_terms_add_up_as_written():
    """One row, one expert, no gate, relu: 2 * 3 = 6, times 0.5, with weight 2; a bfloat16 result of 6."""
    layer = Layer((Expert((one(3),), one(0.5)),), Function("relu", gated=False))
    exact, bound = mixture_bound(np.array([[2.0]]), np.array([[2.0]]), np.array([[0]]), layer, "bfloat16")
    u, tiny = 2.0**-24, 2.0**-126
    n = gamma(4, u) + gamma(4, 2.0**-53)
    first = n * 6 + tiny * (2 + 3 + 4)
    between = first + 2 * u * (6 + first) + tiny * (6 + first + 1)
    second = n * (6 + between) * 0.5 + tiny * (6 + between + 0.5 + 4) + between * 0.5
    summed = 2 * second + tiny * (3 + second + 2) + gamma(3, u) * 2 * (3 + second)
    assert exact.tolist() == [[6.0]]
    assert bound == pytest.approx(np.array([[summed + 2.0**-8 * (6 + summed) + 2.0**-134]]), rel=1e-12)


def test_casts_widen_the_bound_by_what_they_round():
    """3.01 is no bfloat16 and so costs its distance; 3 is one, and costs nothing."""
    for code, costs in ((3.0, False), (3.01, True)):
        layer = Layer((Expert((one(code),), one(1.0)),), Function("relu", gated=False))
        given = (np.array([[1.0]]), np.array([[1.0]]), np.array([[0]]), layer, "float32")
        plain, wider = mixture_bound(*given)[1], mixture_bound(*given, (Cast("gate_up", "bfloat16"),))[1]
        assert (wider[0, 0] > 2 * plain[0, 0]) == costs
        expert = mixture_bound(*given, (Cast("expert", "bfloat16"),))[1]
        assert expert[0, 0] == pytest.approx(2.0**-8 * code, rel=1e-3)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_bound_leaves_no_room_beside_the_rounding_of_the_result(dtype):
    """Where nothing is rounded before, the worst of many results uses more than 0.9 of its bound."""
    hazard = next(each for each in EXPERT_CATALOGUE if each.name == f"exact-sums-{dtype}")
    case = ExpertCase(PlainExperts(), CPU, torch.device("cpu"), hazard)
    x, routing = case.inputs(64), case.route(64, "spread")
    y = case.apply(x, routing)
    exact, bound = mixture_bound(
        to_float64(x), routing.factors(), routing.chosen(4), oracle_layer(hazard, quantizes_x=False), dtype
    )
    used = np.abs(to_float64(y) - exact)[exact != 0] / bound[exact != 0]
    assert 0.9 < used.max() <= 1


@pytest.mark.parametrize("cast", [Cast("expert", "int8"), Cast("h", "bfloat16"), Cast("inputs", "float16")])
def test_what_no_bound_can_be_derived_from_is_refused(cast):
    layer = Layer((Expert((one(3),), one(0.5)),), Function("relu", gated=False))
    with pytest.raises(ValueError, match="cannot derive a bound from"):
        mixture_bound(np.ones((1, 1)), np.ones((1, 1)), np.zeros((1, 1), int), layer, "bfloat16", (cast,))


def test_functions_and_permissions_without_a_rule_are_refused():
    layer = Layer((Expert((one(3),), one(0.5)),), Function("tanh", gated=False))
    given = (np.ones((1, 1)), np.ones((1, 1)), np.zeros((1, 1), int))
    with pytest.raises(ValueError, match="no rule for tanh"):
        mixture(*given, layer)
    with pytest.raises(ValueError, match="with alpha -1"):
        function_error(np.ones((1, 1)), np.zeros((1, 1)), Function("silu", gated=False, alpha=-1.0))
    shared = read_activation("int8/tensor/dynamic", "here")
    with pytest.raises(ValueError, match="no rule for experts for"):
        mixture(*given, Layer((Expert((one(3),), one(0.5)),), Function("relu", gated=False), shared))


def test_rows_without_an_expert_have_no_room():
    layer = Layer((Expert((one(3),), one(0.5)),), Function("relu", gated=False))
    exact, bound = mixture_bound(np.ones((2, 1)), np.ones((2, 1)), np.array([[0], [1]]), layer, "bfloat16")
    assert (exact[1], bound[1]) == (0.0, 0.0)
    assert bound[0] > 0


def test_a_row_that_overflows_may_be_infinite():
    """The square of 60000 does not fit into float16."""
    layer = Layer((Expert((one(1),), one(1)),), Function("relu2", gated=False))
    x = np.array([[60000.0], [2.0]])
    _, bound = mixture_bound(x, np.ones((2, 1)), np.zeros((2, 1), int), layer, "float16")
    assert np.isinf(bound[0, 0])
    assert bound[1, 0] < 0.01


def test_what_may_be_rounded_or_not_may_be_both():
    """1 is a bfloat16, and stays one with an error that is smaller than half a step; 1.001 is 0.001 away from one."""
    exact = np.array([1.0, 1.001, 1 + 2.0**-8])
    found = rounded_error(exact, np.array([2.0**-12, 2.0**-12, 2.0**-30]), "bfloat16")
    assert found == pytest.approx([2.0**-12, 0.001, 2.0**-8], rel=1e-6)


RULES = (
    Rule("int8", "token", True),
    Rule("int8", "group", True, 4),
    Rule("float8_e4m3fn", "token", True),
    Rule("float8_e4m3fn", "group", True, 4, "float8_e8m0fnu"),
    Rule("float4_e2m1fn", "group", True, 4, "float8_e8m0fnu"),
    Rule("float4_e2m1fn", "group", True, 4, "float8_e4m3fn"),
)


@example(RULES[-1], 573, 0.9)  # the least scale that the group may have is 0
@given(st.sampled_from(RULES), st.integers(0, 2**32 - 1), st.sampled_from((2.0**-20, 2.0**-9, 0.1, 0.9)))
@settings(quick, max_examples=150)
def test_an_x_that_is_known_up_to_a_bound_gives_codes_within_the_error(rule, seed, part):
    """However x moves within its bound, what it becomes is no farther away than the oracle says."""
    generator = np.random.default_rng(seed)
    x = generator.standard_normal((3, 10)) * 2.0 ** generator.integers(-6, 6, (3, 10))
    off = part * np.abs(x) * generator.choice([0.0, 1.0], x.shape)
    found = quantize(x, rule, off=off)
    assert found.values.tolist() == quantize(x, rule).values.tolist()
    for _ in range(20):
        moved = x + off * generator.choice([-1.0, 1.0, generator.uniform(-1, 1)], x.shape)
        assert (np.abs(quantize(moved, rule).values - found.values) <= found.error * (1 + 2.0**-40)).all()


def test_an_x_that_is_known_exactly_has_the_error_of_its_evaluation_alone():
    """Nothing changes where nothing is unknown."""
    x = np.random.default_rng(0).standard_normal((4, 12))
    for rule in RULES:
        for one_way, other in pairwise((quantize(x, rule), quantize(x, rule, off=0.0), quantize(x, rule, off=0 * x))):
            assert one_way.error.tolist() == other.error.tolist()


def test_more_scales_than_three_are_enclosed_by_the_two_ends():
    """A group of which nothing is known may have any scale: the error covers its whole range."""
    rule = Rule("float4_e2m1fn", "group", True, 4, "float8_e8m0fnu")
    found = quantize(np.array([[1.0, 0.5, 0.25, 0.0]]), rule, off=np.ones((1, 4)))
    assert (found.error >= 1.0).all()
    choices = activation._dynamic_choices(np.ones((1, 4)), rule, 1.0, np.ones((1, 4)))
    assert len(choices) == 3
    assert all((choice.least < choice.most).all() for choice in choices)
    assert floats.largest(rule.element) == 6
