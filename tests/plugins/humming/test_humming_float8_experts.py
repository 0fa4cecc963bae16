"""
Experts whose x and h are quantized, element by element: Triton's interpreter and a stand-in for humming.

On a machine with a GPU tests/device does the same, and more, with humming itself.
"""

from __future__ import annotations

import os

import humming_stand_in
import numpy as np
import pytest
import torch

from quantplug.kernel import Accepted
from quantplug.moe import ExpertFunction
from quantplug.platform import Platform
from quantplug.spec import ElementType, PerBlock, PerChannel, PerTensor, WeightSpec
from quantplug_humming.expertfit import forms_of
from quantplug_humming.float8experts import FastFloat8HummingExperts, Float8HummingExperts
from quantplug_humming.form import Form
from quantplug_humming.prepare import layer_config
from quantplug_testkit.compare import assert_bitwise_equal
from quantplug_testkit.conformance.experts import EXPERT_CATALOGUE, MoEKernelConformance
from quantplug_testkit.conformance.experts.case import ExpertCase
from quantplug_testkit.conformance.experts.hazard import family
from quantplug_testkit.oracles.activation import Rule, quantize

pytest.importorskip("triton", reason="triton is installed on Linux only")
from quantplug_humming.entering import Activation, Entering, activated, quantized  # needs triton
from quantplug_humming.routing import Choices

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("Triton compiles for the GPU here: see tests/device", allow_module_level=True)

pytestmark = pytest.mark.usefixtures("stand_in")

KERNEL, FAST = Float8HummingExperts(), FastFloat8HummingExperts()
GPU = Platform.parse("cuda:9.0")
ROWS = WeightSpec(ElementType.FLOAT8_E4M3FN, PerChannel(), "float32")
WHOLE = WeightSpec(ElementType.FLOAT8_E4M3FN, PerTensor(), "float32")
BLOCKS = WeightSpec(ElementType.FLOAT8_E4M3FN, PerBlock(128, 128), "float32")
TOKEN, GROUP = "float8_e4m3fn/token/dynamic", "float8_e4m3fn/group128/dynamic"
MORE = (
    *family("bias-odd", ROWS, experts=3, hidden=61, intermediate=33, bias=True, activation=TOKEN),
    *family("one-scale", WHOLE, hidden=40, intermediate=24, activation=TOKEN),
    *family("on-input", ROWS, top_k=1, weight_on_input=True, bias=True, activation=TOKEN),
    *family("relu2", ROWS, function=ExpertFunction("relu2", gated=False), activation=TOKEN),
    *family("limit", ROWS, function=ExpertFunction("silu", limit=1.0, alpha=1.702, up_offset=1.0), reach=4.0,
            activation=TOKEN),
    *family("blocks-odd", BLOCKS, hidden=200, intermediate=256, bias=True, activation=GROUP),
    *family("blocks-no-gate", BLOCKS, hidden=130, intermediate=33, function=ExpertFunction("gelu", gated=False),
            activation=GROUP),
)  # fmt: skip
FAMILIES = {
    hazard.family: hazard
    for hazard in (*EXPERT_CATALOGUE, *MORE)
    if isinstance(KERNEL.supports(hazard.problem, GPU), Accepted)
}


def case_of(name: str, kernel: Float8HummingExperts = KERNEL) -> ExpertCase:
    return ExpertCase(kernel, GPU, torch.device("cpu"), FAMILIES[name])


def test_all_that_is_meant_is_accepted():
    assert {hazard.family for hazard in MORE} <= FAMILIES.keys()
    assert {"x-float8", "x-float8-tiles", "x-float8-groups-and-blocks"} <= FAMILIES.keys()


@pytest.mark.parametrize("name", FAMILIES)
def test_every_element_is_within_the_derived_bound(name):
    case = case_of(name)
    x, routing = case.inputs(3), case.route(3)
    case.check(x, routing, case.apply(x, routing), "3 rows")


class Suite(MoEKernelConformance):
    """What the testkit asks of every kernel; here of some layers, for an interpreter takes its time."""

    kernel, platform, device = KERNEL, GPU, "cpu"


@pytest.mark.parametrize(
    ("ask", "name"),
    [
        (Suite.test_padding_gives_exactly_zero, "bias-odd"),
        (Suite.test_input_of_any_stride_is_read_right, "x-float8"),
        (Suite.test_input_of_any_stride_is_read_right, "x-float8-groups-and-blocks"),
        (Suite.test_preparing_again_keeps_addresses, "bias-odd"),
        (Suite.test_preparing_again_keeps_addresses, "blocks-odd"),
        (Suite.test_compiles_into_one_graph, "x-float8"),
    ],
)
def test_what_the_testkit_asks_holds_for_some_layers(ask, name):
    ask(Suite(), FAMILIES[name])


@pytest.mark.parametrize("name", ["x-float8", "one-scale"])
def test_fast_sums_share_the_layout_and_are_within_their_bound(name):
    precise, fast = case_of(name), case_of(name, FAST)
    assert precise.prepared.layout_id == fast.prepared.layout_id
    for key, tensor in precise.prepared.tensors.items():
        assert_bitwise_equal(fast.prepared.tensors[key], tensor, key)
    x, routing = fast.inputs(5), fast.route(5)
    fast.check(x, routing, FAST.apply(x, routing.weights, routing.ids, precise.prepared), "5 rows")


def test_codes_that_are_given_out_follow_the_router_and_its_map():
    case = case_of("x-float8")
    for rows, kind in ((26, "one-expert"), (9, "idle-ends"), (3, "nowhere"), (20, "spread")):
        x, routing = case.inputs(rows), case.route(rows, kind)
        case.check(x, routing, case.apply(x, routing), f"{rows} rows, {kind}")
    case.apply(case.inputs(0), case.route(0))


def form(inputs: int, shared: str, *, promoted: bool = False) -> Form:
    """Return the form of a product of so many inputs, whose x shares a scale per token or group."""
    return Form(128, inputs, 8, 1, 128 * (shared == "group"), 0, 0, 0, 1, 128 * (shared == "group"), int(promoted))


def check_entering(made: Entering, exact: np.ndarray, shared: str, off: np.ndarray | float = 0.0) -> None:
    """Hold codes and scales to what the oracle makes of values that are known up to `off`."""
    wanted = quantize(exact, Rule("float8_e4m3fn", shared, dynamic=True, group_size=128), off=off)
    scales = made.scales.repeat_interleave(made.values.shape[1] // made.scales.shape[1], 1)
    found = made.values.double().numpy() * scales.double().numpy()
    assert not found[:, exact.shape[1] :].any()
    error = np.abs(found[:, : exact.shape[1]] - wanted.values)
    assert (error <= wanted.error).all(), float((error - wanted.error).max())


@pytest.mark.parametrize(("shared", "promoted"), [("token", False), ("token", True), ("group", True)])
@pytest.mark.parametrize("inputs", [128, 200, 384])
def test_x_becomes_what_the_oracle_makes_of_it(shared, promoted, inputs):
    generator = torch.Generator().manual_seed(inputs)
    x = torch.randn(5, inputs, generator=generator)
    x[:, 128:] *= 20
    x[3] = 0
    x = x.bfloat16()
    made = quantized(x, form(inputs, shared, promoted=promoted))
    assert made.scales.shape == (5, -(-inputs // 128) if promoted else 1)
    assert shared == "group" or bool((made.scales == made.scales[:, :1]).all())
    check_entering(made, x.double().numpy(), shared)


@pytest.mark.parametrize(("shared", "promoted"), [("token", False), ("token", True), ("group", True)])
@pytest.mark.parametrize("gated", [False, True])
def test_h_becomes_what_the_oracle_makes_of_it(shared, promoted, gated):
    size = 200
    product = torch.randn(6, size * (1 + gated), generator=torch.Generator().manual_seed(0))
    product[:, 150:size] *= 20
    product = product.bfloat16()
    ids = torch.tensor([[0, 1], [2, 0], [1, 1]])
    function = Activation("silu" if gated else "relu", gated, None, 1.0, 0.0)
    made = activated(product, Choices(ids, None, 3), form(size, shared, promoted=promoted), function)
    exact = product.double()
    h = torch.nn.functional.silu(exact[:, :size]) * exact[:, size:] if gated else exact.clamp(min=0)
    # silu in float32 is off by less than 16 roundings; relu is exact
    check_entering(made, h.numpy(), shared, off=h.abs().numpy() * 2.0**-20 if gated else 0.0)


@pytest.mark.parametrize("name", ["x-float8", "one-scale", "blocks-odd", "bias-odd"])
def test_weights_are_held_as_they_are_but_for_scales_in_bfloat16(name):
    case = case_of(name)
    problem, tensors = case.hazard.problem, case.prepared.tensors
    for product, made in zip(("w13", "w2"), forms_of(problem, float8=True), strict=True):
        for number, expert in enumerate(case.experts()):
            parts = expert.w13 if product == "w13" else (expert.w2,)
            held = [tensors[f"{product}.{what}"][number] for what in ("weight", "weight_scale")]
            values, scale = humming_stand_in.decode(
                layer_config(made), held[0], held[1].reshape(-1, *held[1].shape[1:]), None
            )
            found = (values * scale.reshape(-1, 1))[: made.outputs, : problem.hidden if product == "w13" else None]
            size, row = made.outputs // len(parts), 0
            for weight in parts:
                exact = weight.dequantize(torch.float32)
                own = found[row : row + exact.shape[0], : exact.shape[1]]
                assert float(((own - exact).abs() - exact.abs() * 2.0**-8).max()) <= 0
                if made.block or made.single:
                    assert torch.equal(own, exact)
                row += size
