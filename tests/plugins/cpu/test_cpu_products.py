"""Products of the CPU kernels where the conformance class does not look: every code, uneven groups, gradients."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from cpu_layers import Layer, problem, spec, weights

from quantplug.spec import ElementType, PerChannel, PerTensor
from quantplug.weight import Weight
from quantplug_cpu.int4 import Int4Kernel
from quantplug_cpu.int8 import Int8Kernel
from quantplug_testkit.bounds import gamma, unit_roundoff
from quantplug_testkit.canonical import code_range, to_float64
from quantplug_testkit.compare import assert_within

ROWS = (0, 1, 3, 17, 27, 28, 55, 56, 65, 200)
"""Around the numbers of rows at which another way is taken."""


def kernel_for(element: str) -> Int4Kernel | Int8Kernel:
    return Int8Kernel() if element.endswith("8") else Int4Kernel()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("element", [str(kind) for kind in ElementType if not kind.floating])
def test_every_code_with_every_zero_point_has_its_exact_value(element: str, dtype: str) -> None:
    """With powers of two as scales and one input at a time, the product is the value itself, to the bit."""
    kind = ElementType(element)
    lowest, highest = code_range(kind)
    count = highest - lowest + 1
    k = max(32, count)
    codes = (torch.arange(k) % count + lowest).to(torch.int8 if kind.signed else torch.uint8)
    n = 1 if kind.signed else count
    weight = Weight(
        codes=codes.expand(n, k).contiguous(),
        scales=torch.full((n, k // 32), 0.25, dtype=torch.float16),
        spec=spec(element, 32),
        zeros=None if kind.signed else torch.arange(n).view(n, 1).expand(n, k // 32).to(torch.uint8).contiguous(),
    )
    layer = Layer.of(kernel_for(element), problem(weight.spec, n, k, dtype), (weight,))
    zeros = torch.zeros(n, 1) if kind.signed else torch.arange(n).view(n, 1)
    values = ((codes.to(torch.float32) - zeros) * 0.25).to(getattr(torch, dtype))
    assert torch.equal(layer.kernel.dequantize(layer.prepared, values.dtype), values)
    identity = torch.eye(k, dtype=values.dtype)
    for rows in (1, k):
        found = torch.cat([layer.kernel.apply(x, layer.prepared, None) for x in identity.split(rows)])
        assert torch.equal(found, values.t())


CASES = [
    ("int4", 64, 80, 128, False),
    ("uint4", 32, 33, 100, True),
    ("uint3", 48, 17, 144, False),
    ("uint2", 128, 64, 256, True),
    ("int8", PerChannel(), 33, 50, False),
    ("int8", 64, 48, 128, True),
    ("uint8", 32, 16, 80, False),
    ("uint8", PerTensor(), 5, 37, False),
    ("uint4", 16, 31, 90, False),
]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize(("element", "group", "n", "k", "act_order"), CASES)
def test_any_number_of_rows_is_right(element, group, n: int, k: int, act_order: bool, dtype: str) -> None:
    layer = Layer.of(kernel_for(element), problem(spec(element, group, act_order=act_order), n, k, dtype, bias=True))
    bias = torch.randn(n).to(getattr(torch, dtype))
    for rows in ROWS:
        layer.check(layer.inputs(rows), bias)


@pytest.mark.parametrize("element", ["int4", "uint8"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_groups_of_unequal_size_and_unused_ones_are_right(element: str, dtype: str) -> None:
    """A rank of a row-parallel layer sees some inputs of some groups; scales stay those of the whole."""
    asked = problem(spec(element, 32, act_order=True), 48, 96, dtype)
    (weight,) = weights(replace(asked, in_features=256))
    g_idx = torch.tensor([0] * 3 + [7] * 50 + [2] * 33 + [5] * 10, dtype=torch.int32)
    g_idx = g_idx[torch.randperm(96, generator=torch.Generator().manual_seed(1))]
    layer = Layer.of(kernel_for(element), asked, (replace(weight, codes=weight.codes[:, :96], g_idx=g_idx),))
    for rows in (1, 17, 64):
        layer.check(layer.inputs(rows))
    with pytest.raises(NotImplementedError):
        layer.kernel.unprepare(layer.prepared)


def test_a_part_of_a_layer_with_fewer_inputs_than_a_group_uses_the_scales_of_all_its_groups() -> None:
    asked = problem(spec("int8", 128, act_order=True), 16, 64)
    (weight,) = weights(replace(asked, in_features=512))
    g_idx = (torch.arange(64) % 4).to(torch.int32)
    layer = Layer.of(Int8Kernel(), asked, (replace(weight, codes=weight.codes[:, :64], g_idx=g_idx),))
    for rows in (1, 17, 64):
        layer.check(layer.inputs(rows))


@pytest.mark.parametrize("same", [True, False])
def test_segments_with_one_order_of_inputs_become_one_product_and_others_one_each(same: bool) -> None:
    asked = problem(spec("uint4", 32, act_order=True), (48, 16, 32), 128)
    given = weights(asked)
    if same:
        given = tuple(replace(weight, g_idx=given[0].g_idx) for weight in given)
    layer = Layer.of(Int4Kernel(), asked, given)
    assert layer.prepared.meta["parts"] == (1 if same else 3)
    for rows in (1, 17, 64):
        layer.check(layer.inputs(rows))


def test_an_act_order_layer_that_is_in_order_permutes_nothing() -> None:
    asked = problem(spec("int4", 32, act_order=True), 64, 128)
    (weight,) = weights(asked)
    trivial = (torch.arange(128) // 32).to(torch.int32)
    for g_idx in (None, trivial):
        layer = Layer.of(Int4Kernel(), asked, (replace(weight, g_idx=g_idx),))
        assert "columns.0" not in layer.prepared.tensors
        layer.check(layer.inputs(3))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize(("element", "group", "n", "k", "act_order"), CASES)
@pytest.mark.parametrize("rows", [1, 70])
def test_gradients_reach_x(element, group, n: int, k: int, act_order: bool, dtype: str, rows: int) -> None:
    layer = Layer.of(kernel_for(element), problem(spec(element, group, act_order=act_order), n, k, dtype, bias=True))
    x = layer.inputs(rows).view(1, rows, k).requires_grad_()
    bias = torch.randn(n).to(x.dtype)
    y = layer.kernel.apply(x, layer.prepared, bias)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(x.dtype)
    y.backward(grad)
    assert x.grad is not None
    values = to_float64(layer.kernel.dequantize(layer.prepared, torch.float32))
    exact = to_float64(grad)[0] @ values
    # Each term is a product of two numbers that were rounded to the dtype once; the sum is rounded to it once more.
    total, u = np.abs(to_float64(grad)[0]) @ np.abs(values), unit_roundoff(dtype)
    bound = (gamma(n + 2, unit_roundoff("float32")) + gamma(3, u)) * total + 2.0**-24
    assert_within(x.grad[0], exact, bound)
    layer.check(x.detach()[0], bias)


@pytest.mark.parametrize("element", ["int4", "int8", "uint8"])
def test_a_product_in_grad_mode_without_gradients_takes_the_fast_way(element: str) -> None:
    layer = Layer.of(kernel_for(element), problem(spec(element, PerChannel()), 64, 128))
    x = layer.inputs(2)
    y = layer.kernel.apply(x, layer.prepared, None)
    with torch.inference_mode():
        assert torch.equal(layer.kernel.apply(x, layer.prepared, None), y)
    assert not y.requires_grad


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("element", ["int4", "int8", "uint8"])
def test_compiling_takes_one_graph_for_few_rows_and_one_for_many(element: str, dynamic: bool | None) -> None:
    layer = Layer.of(kernel_for(element), problem(spec(element, PerChannel()), 64, 128))
    torch.compiler.reset()
    graphs = itertools.count()

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> torch.fx.GraphModule:
        next(graphs)
        return graph

    compiled = torch.compile(
        lambda x: layer.kernel.apply(x, layer.prepared, None), fullgraph=True, backend=backend, dynamic=dynamic
    )
    for rows in (5, 7, 9, 11, 13, 100, 150, 200):
        x = layer.inputs(rows).unsqueeze(0)
        assert torch.equal(compiled(x), layer.kernel.apply(x, layer.prepared, None))
    # One more where the first number of rows was taken for the only one.
    assert next(graphs) <= (2 if dynamic else 4)


@pytest.mark.parametrize("element", ["int4", "int8", "uint8"])
def test_a_compiled_layer_has_gradients(element: str) -> None:
    layer = Layer.of(kernel_for(element), problem(spec(element, PerChannel()), 64, 128))
    torch.compiler.reset()
    compiled = torch.compile(lambda x: layer.kernel.apply(x, layer.prepared, None), fullgraph=True, backend="aot_eager")
    grads = []
    for run in (compiled, lambda x: layer.kernel.apply(x, layer.prepared, None)):
        x = layer.inputs(3).requires_grad_()
        run(x).sum().backward()
        grads.append(x.grad)
    assert torch.equal(*grads)


def test_own_operators_keep_torchs_rules() -> None:
    from quantplug_cpu import rowwise, tiles

    x = torch.randn(3, 64, requires_grad=True)
    packed = torch.randint(0, 256, (64, 32), dtype=torch.uint8)
    scales, zeros = torch.rand(2, 64), torch.randint(0, 16, (2, 64), dtype=torch.uint8)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(tiles.linear_by_tiles, (x, packed, scales, zeros, 1), test_utils=tests)
    torch.library.opcheck(
        torch.ops.quantplug_cpu.packed_values.default, (packed, scales, zeros, 1, torch.float32), test_utils=tests[:3]
    )
    codes = torch.randint(-128, 128, (8, 64), dtype=torch.int8)
    for bias in (None, torch.randn(8)):
        arguments = (x, codes, torch.rand(8), bias)
        torch.library.opcheck(torch.ops.quantplug_cpu.rowwise_linear.default, arguments, test_utils=tests)
    assert rowwise.STEP == 16
