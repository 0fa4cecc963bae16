"""Quantized x: numbers to the bit, both ways to multiply, stored scales, gradients, one layout for two kernels."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from cpu_layers import CPU, Layer, problem, spec, with_scales

from quantplug.activations import read_activation
from quantplug.kernel import Accepted, Rejected
from quantplug.platform import Platform
from quantplug.spec import LinearProblem, PerChannel, PerTensor
from quantplug.weight import ActivationParams
from quantplug_cpu import quantized
from quantplug_cpu import w8a8 as w8a8_module
from quantplug_cpu.int8 import Int8Kernel
from quantplug_cpu.w8a8 import W8A8Kernel
from quantplug_testkit.compare import assert_bitwise_equal

W8A8, EIGHT = W8A8Kernel(), Int8Kernel()
TOKEN, TENSOR = "int8/token/dynamic", "int8/tensor/dynamic"
STATIC, SHIFTED = "int8/tensor/static", "uint8/tensor/static"
PER_ROW = spec("int8", PerChannel(), scales="float32")


def asked(activation: str, n=48, k: int = 96, dtype: str = "bfloat16", *, bias: bool = False) -> LinearProblem:
    return replace(problem(PER_ROW, n, k, dtype, bias=bias), activation=read_activation(activation, "here"))


def params(scale: float, zero: int | None = None) -> ActivationParams:
    point = None if zero is None else torch.tensor(zero, dtype=torch.uint8)
    return ActivationParams(torch.tensor(scale, dtype=torch.float32), point)


def by_hand(
    layer: Layer, x: torch.Tensor, stored: tuple[ActivationParams, ...] | None, bias: torch.Tensor | None
) -> torch.Tensor:
    """Compute as the docstring of `quantized` says, one rounding after the other, in NumPy."""
    activation = layer.problem.activation
    assert activation is not None
    exact, parts = x.to(torch.float32).numpy(), []
    for number, weight in enumerate(layer.weights):
        codes = weight.codes.to(torch.int64).numpy()
        if stored is None:
            amax = (
                np.abs(exact).max(axis=1, keepdims=True) if activation.granularity == "token" else np.abs(exact).max()
            )
            scale, zero = np.maximum((amax / np.float32(127)).astype(np.float32), np.float32(2.0**-126)), 0
            lowest, highest = -128, 127
        else:
            point = stored[number].zero
            scale, zero = np.float32(float(stored[number].scale)), 0 if point is None else int(point)
            lowest, highest = (-128, 127) if point is None else (0, 255)
        x_codes = np.clip(np.rint(exact / scale).astype(np.int64) + zero, lowest, highest) - zero
        sums = (x_codes @ codes.T).astype(np.float32)
        parts.append(sums * weight.scales[:, 0].numpy() * scale)
    y = torch.from_numpy(np.concatenate(parts, axis=1).astype(np.float32))
    return (y if bias is None else y + bias.to(torch.float32)).to(x.dtype)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("rows", [1, 2, 17, 300])
@pytest.mark.parametrize("activation", [TOKEN, TENSOR, STATIC, SHIFTED])
@pytest.mark.parametrize("k", [96, 100, 2048])
def test_products_are_what_the_rules_give_to_the_bit(k: int, activation: str, rows: int, dtype: str) -> None:
    """K of 100 is filled up; rows 2048 apart are multiplied the other way round; 300 rows in two pieces."""
    stored = None
    if not activation.endswith("dynamic"):
        stored = (params(0.02, None if activation == STATIC else 101),)
    layer = Layer.of(W8A8, asked(activation, 48, k, dtype, bias=True), stored=stored)
    x, bias = layer.inputs(rows), torch.randn(48).to(getattr(torch, dtype))
    assert_bitwise_equal(W8A8.apply(x, layer.prepared, bias), by_hand(layer, x, stored, bias))
    assert_bitwise_equal(W8A8.apply(x, layer.prepared, None), by_hand(layer, x, stored, None))


@pytest.mark.parametrize("activation", [STATIC, SHIFTED])
@pytest.mark.parametrize("same", [True, False])
def test_segments_of_a_fused_layer_have_stored_scales_of_their_own(same: bool, activation: str) -> None:
    stored = tuple(
        params(0.02 if same else 0.01 * i, None if activation == STATIC else (101 if same else 90 + i))
        for i in (1, 2, 3)
    )
    layer = Layer.of(W8A8, asked(activation, (33, 7, 16), bias=True), stored=stored)
    assert ("x_scale.1" in layer.prepared.tensors) is not same
    bias = torch.randn(56).to(torch.bfloat16)
    for rows in (0, 1, 17):
        x = layer.inputs(rows)
        assert_bitwise_equal(W8A8.apply(x, layer.prepared, bias), by_hand(layer, x, stored, bias))


def test_a_stored_scale_that_some_segments_lack_is_refused() -> None:
    with pytest.raises(ValueError, match="a stored scale of x is there for some segments only"):
        Layer.of(W8A8, asked(STATIC, (16, 16)), stored=(params(0.1), None))


def test_sums_of_the_largest_codes_fit() -> None:
    """At the largest K, each product with a zero point at the end of its range is the largest there is."""
    k = w8a8_module._MOST_INPUTS
    for activation, stored in ((TOKEN, None), (SHIFTED, (params(1.0, 0),)), (SHIFTED, (params(1.0, 255),))):
        layer = Layer.of(W8A8, asked(activation, 2, k, "float32"), stored=stored)
        (weight,) = layer.weights
        extreme = replace(weight, codes=torch.tensor([[-128], [127]], dtype=torch.int8).expand(2, k).contiguous())
        layer = Layer.of(W8A8, layer.problem, (extreme,), stored)
        for x in (torch.full((1, k), 1000.0), torch.full((2, k), -1000.0)):
            assert_bitwise_equal(W8A8.apply(x, layer.prepared, None), by_hand(layer, x, stored, None))
    refusal = W8A8.supports(asked(TOKEN, 2, k + 1), CPU)
    assert isinstance(refusal, Rejected)
    assert (refusal.code, refusal.reason, refusal.fix) == ("shape", f"in_features is {k + 1}", f"at most {k}")


def test_no_rows_have_no_largest_element() -> None:
    for activation in (TOKEN, TENSOR):
        layer = Layer.of(W8A8, asked(activation))
        assert W8A8.apply(layer.inputs(0), layer.prepared, None).shape == (0, 48)


@pytest.mark.parametrize(
    ("activation", "element", "shared", "code", "reason"),
    [
        ("none", "int8", PerChannel(), "activation", "the file permits none"),
        ("int8/group32/dynamic", "int8", PerChannel(), "activation", "x as int8 group 32, dynamic"),
        ("float8_e4m3fn/token/dynamic", "int8", PerChannel(), "activation", "float8_e4m3fn per token"),
        ("uint8/token/dynamic", "int8", PerChannel(), "activation", "uint8 per token"),
        ("int8/token/static", "int8", PerChannel(), "activation", "int8 per token, static"),
        (TOKEN, "int4", PerChannel(), "element", "int4 has 4 bits"),
        (TOKEN, "uint8", PerChannel(), "element", "uint8 codes have zero points"),
        (TOKEN, "int8", 32, "granularity", "scales change along a row: int8 group 32"),
    ],
)
def test_refusals_name_what_does_not_fit(activation: str, element: str, shared, code: str, reason: str) -> None:
    weight = problem(spec(element, shared), 48, 96)
    refusal = W8A8.supports(replace(weight, activation=read_activation(activation, "here")), CPU)
    assert isinstance(refusal, Rejected)
    assert (refusal.code, reason in refusal.reason) == (code, True), refusal
    assert refusal.fix


def test_one_prepared_layer_serves_both_kernels() -> None:
    """So a plan can leave few rows as they are and quantize many, and either may have prepared the layer."""
    for kernel, other in ((W8A8, EIGHT), (EIGHT, W8A8)):
        layer = Layer.of(kernel, asked(TOKEN))
        replace(layer, kernel=EIGHT).check(layer.inputs(3))
        assert_bitwise_equal(
            W8A8.apply(layer.inputs(3), layer.prepared, None), by_hand(layer, layer.inputs(3), None, None)
        )
        assert kernel.layout_id == other.layout_id
        assert kernel.unprepare(layer.prepared)[0].scales.dtype == torch.float32


def test_a_plan_quantizes_x_from_some_number_of_rows_on() -> None:
    small, large = asked(TOKEN, 576, 576), asked(TOKEN, 4096, 4096)
    costs = {}
    for name, question in (("small", small), ("large", large)):
        verdicts = [kernel.supports(question, CPU) for kernel in (EIGHT, W8A8)]
        costs[name] = [verdict.cost for verdict in verdicts if isinstance(verdict, Accepted)]
    assert costs["small"][0].at(1) < costs["small"][1].at(1)
    assert costs["small"][1].at(16) < costs["small"][0].at(16)
    assert costs["large"][1].at(1) < costs["large"][0].at(1)


@pytest.mark.parametrize("rows", [3, 300])
def test_gradients_pass_straight_through_the_rounding(rows: int) -> None:
    layer = Layer.of(W8A8, asked(TOKEN, dtype="float32", bias=True))
    x = layer.inputs(rows).requires_grad_()
    bias = torch.randn(48, requires_grad=True)
    y = W8A8.apply(x, layer.prepared, bias)
    assert_bitwise_equal(y.detach(), by_hand(layer, x.detach(), None, bias.detach()))
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    y.backward(grad)
    values = layer.kernel.dequantize(layer.prepared, torch.float32).to(torch.float64)
    assert x.grad is not None
    assert bias.grad is not None
    limit = 50 * 2.0**-24 * (grad.to(torch.float64).abs() @ values.abs())
    assert bool(((x.grad.to(torch.float64) - grad.to(torch.float64) @ values).abs() <= limit).all())
    assert torch.equal(bias.grad, grad.sum(0))


@pytest.mark.parametrize("dynamic", [None, True])
def test_compiling_takes_few_graphs(dynamic: bool | None) -> None:
    layer = Layer.of(W8A8, asked(TOKEN))
    torch.compiler.reset()
    graphs = itertools.count()

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> torch.fx.GraphModule:
        next(graphs)
        return graph

    compiled = torch.compile(
        lambda x: W8A8.apply(x, layer.prepared, None), fullgraph=True, backend=backend, dynamic=dynamic
    )
    for rows in (5, 7, 9, 11, 100, 300, 400):
        x = layer.inputs(rows).unsqueeze(0)
        assert torch.equal(compiled(x), W8A8.apply(x, layer.prepared, None))
    assert next(graphs) <= (2 if dynamic else 4)


def test_the_operator_keeps_torchs_rules() -> None:
    x = torch.randn(3, 64, requires_grad=True)
    codes = torch.randint(-128, 128, (8, 64), dtype=torch.int8)
    scales, bias, offsets = torch.rand(8), torch.randn(8), torch.randint(-9, 9, (8,), dtype=torch.int32)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    for arguments in (
        (x, codes, scales, None, None, None, bias, False),
        (x, codes, scales, torch.tensor(0.1), torch.tensor(120.0), offsets, None, True),
    ):
        torch.library.opcheck(quantized._by_pieces, arguments, test_utils=tests)


def test_a_wrong_product_and_a_missing_operator_are_refused(monkeypatch) -> None:
    def saturating(x: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        """Add up pairs of products in 16 bits, as processors do that have no better instruction."""
        products = x.to(torch.int32).unsqueeze(2) * codes.to(torch.int32).unsqueeze(0)
        return products.unflatten(1, (-1, 2)).sum(2).clamp(-(2**15), 2**15 - 1).sum(1).to(torch.int32)

    assert W8A8.probe(CPU) is None
    assert W8A8.probe(Platform.parse("cuda:9.0")) is None
    monkeypatch.setattr(torch, "_int_mm", saturating)
    refusal = w8a8_module._probe.__wrapped__()
    assert refusal is not None
    assert "small product of int8 codes is wrong" in refusal.reason
    monkeypatch.delattr(torch, "_int_mm")
    refusal = w8a8_module._probe.__wrapped__()
    assert refusal is not None
    assert "has no operator _int_mm" in refusal.reason


def test_one_scale_for_the_whole_weight_is_one_for_every_row() -> None:
    whole = replace(asked(TOKEN), segments=problem(spec("int8", PerTensor()), 48, 96).segments)
    layer = Layer.of(W8A8, whole)
    (weight,) = layer.weights
    x = layer.inputs(5)
    spread = with_scales(weight, weight.scales.to(torch.float32).expand(48, 1))
    assert_bitwise_equal(W8A8.apply(x, layer.prepared, None), by_hand(replace(layer, weights=(spread,)), x, None, None))
