"""The operator: one scale for all of x, strides, torch's rules, and what cannot be run."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from quantplug.activations import read_activation
from quantplug.platform import Platform
from quantplug.spec import ElementType, LinearProblem, PerChannel, PerTensor, SegmentSpec, WeightSpec
from quantplug_cublas import product
from quantplug_cublas.kernel import CublasKernel, _probe
from quantplug_testkit.canonical import make_weight

KERNEL, CPU = CublasKernel(), torch.device("cpu")
WHOLE = WeightSpec(ElementType.FLOAT8_E4M3FN, PerTensor(), "float32")
ROWS = replace(WHOLE, granularity=PerChannel())


def problem(spec, sizes, activation):
    segments = tuple(SegmentSpec(size, spec) for size in sizes)
    return LinearProblem(96, segments, "float32", activation=read_activation(activation, "here"))


def weights(asked):
    generator = np.random.default_rng(0)
    return [make_weight(s.weight, s.out_features, asked.in_features, generator) for s in asked.segments]


def prepare(asked):
    return KERNEL.prepare(asked, weights(asked), [None] * len(asked.segments), CPU)


@pytest.mark.parametrize("spec", [WHOLE, ROWS])
@pytest.mark.parametrize("few", [0, 1 << 20])
def test_one_scale_for_all_of_x(spec, few, monkeypatch):
    """Computed from all rows, in both ways to apply scales."""
    monkeypatch.setattr(product, "_LAUNCHES", False)
    monkeypatch.setattr(product, "_FEW_SUMS", few)
    asked = problem(spec, (48,), "float8_e4m3fn/tensor/dynamic")
    made = prepare(asked)
    x = torch.randn(5, 96, generator=torch.Generator().manual_seed(0))
    scale = x.abs().max() / 448
    codes = (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).double()
    wanted = codes * scale.double() @ weights(asked)[0].dequantize().double().t()
    assert torch.allclose(KERNEL.apply(x, made, None).double(), wanted, rtol=1e-5, atol=1e-5)
    assert not KERNEL.apply(torch.zeros(2, 96), made, None).any()


def test_one_row_and_one_scale_take_a_single_product(monkeypatch):
    """A token that is alone has a scale for all of x: no launch applies scales behind the product."""
    asked = problem(WHOLE, (48,), "float8_e4m3fn/token/dynamic")
    made = prepare(asked)
    assert made.tensors["scales.0"].numel() == 1
    for ways in (product.plain, getattr(product, "launch", product.plain)):
        monkeypatch.setattr(ways, "scaled", lambda *_: pytest.fail("scales are applied behind the product"))
    assert KERNEL.apply(torch.randn(1, 96), made, None).shape == (1, 48)


def test_more_rows_than_a_launch_has_programs_for_take_a_single_product_too(monkeypatch):
    asked = problem(ROWS, (16,), "float8_e4m3fn/token/dynamic")
    made, x, applied = prepare(asked), torch.randn(4, 96), []
    ways = getattr(product, "launch", product.plain) if product.INTERPRETED else product.plain
    scaled = ways.scaled
    monkeypatch.setattr(ways, "scaled", lambda *given: applied.append(1) or scaled(*given))
    monkeypatch.setattr(product, "_MOST_ROWS", 3)
    wide = KERNEL.apply(x, made, None)
    assert not applied
    narrow = KERNEL.apply(x[:3], made, None)
    assert applied
    assert torch.allclose(wide[:3], narrow, rtol=1e-5, atol=1e-5)


def test_leading_dimensions_and_strides_are_free():
    asked = problem(ROWS, (48,), "float8_e4m3fn/token/dynamic")
    made = prepare(asked)
    x = torch.randn(6, 96)
    wide = torch.full((6, 192), torch.nan)
    wide[:, ::2] = x
    y = KERNEL.apply(x, made, None)
    assert torch.equal(KERNEL.apply(wide[:, ::2], made, None), y)
    assert torch.equal(KERNEL.apply(x.view(2, 3, 96), made, None), y.view(2, 3, 48))


def test_the_operator_keeps_torchs_rules():
    asked = problem(ROWS, (40,), "float8_e4m3fn/token/dynamic")
    tensors = prepare(asked).tensors
    x, bias = torch.randn(3, 96), torch.randn(40)
    arguments = (
        x,
        tensors["codes.0"],
        tensors["scales.0"],
        None,
        tensors["one"],
        bias,
        40,
        "token",
        "float8_e4m3fn",
        False,
    )
    # Not test_schema, which compares operands by operators that torch does not have for 8-bit floats.
    torch.library.opcheck(product.linear, arguments, test_utils=("test_faketensor", "test_aot_dispatch_dynamic"))


def test_the_compiler_sees_one_operator():
    asked = problem(ROWS, (48,), "float8_e4m3fn/token/dynamic")
    made = prepare(asked)
    torch.compiler.reset()
    compiled = torch.compile(lambda x: KERNEL.apply(x, made, None), fullgraph=True, backend="aot_eager")
    for rows in (3, 1, 17, 0):
        x = torch.randn(rows, 96)
        assert torch.equal(compiled(x), KERNEL.apply(x, made, None))


def test_the_operator_is_called_where_somebody_sees_it_and_not_otherwise(monkeypatch):
    """Torch's way to it takes as long on the host as a small product on the GPU."""
    asked, x = problem(ROWS, (16, 32), "float8_e4m3fn/token/dynamic"), torch.randn(3, 96)
    made, called = prepare(asked), []
    wanted = KERNEL.apply(x, made, None)
    operator = product.linear
    monkeypatch.setattr(product, "linear", lambda *given: called.append(given) or operator(*given))
    for given in (x, x.view(3, 1, 96)):
        assert torch.equal(KERNEL.apply(given, made, None).view(3, 48), wanted)
    assert not called
    with torch.no_grad():
        assert torch.equal(KERNEL.apply(x.clone().requires_grad_(), made, None), wanted)
        assert torch.equal(KERNEL.apply(torch.nn.Parameter(x), made, None), wanted)
    assert len(called) == 2


def test_a_layer_that_may_not_quantize_x_is_not_run():
    made = replace(prepare(problem(WHOLE, (16,), "float8_e4m3fn/token/dynamic")), problem=problem(WHOLE, (16,), "none"))
    with pytest.raises(TypeError, match="does not permit to quantize x"):
        KERNEL.apply(torch.randn(1, 96), made, None)


def test_the_probe_says_what_is_missing(monkeypatch):
    assert KERNEL.probe(Platform.parse("cpu")) is None
    monkeypatch.delattr(torch, "_scaled_mm")
    refusal = _probe.__wrapped__()
    assert refusal is not None
    assert "has no operator _scaled_mm" in refusal.reason
