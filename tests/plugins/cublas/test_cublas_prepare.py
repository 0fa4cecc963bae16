"""Fused layers, stored scales and scales of x of every kind: what shares a product, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from quantplug.activations import read_activation
from quantplug.kernel import Accepted
from quantplug.platform import Platform
from quantplug.spec import ElementType, LinearProblem, PerBlock, PerChannel, PerTensor, SegmentSpec, WeightSpec
from quantplug.weight import ActivationParams
from quantplug_cublas import product
from quantplug_cublas.kernel import CublasKernel, _probe
from quantplug_testkit.canonical import make_weight

KERNEL, GPU, CPU = CublasKernel(), Platform.parse("cuda:9.0"), torch.device("cpu")
WHOLE = WeightSpec(ElementType.FLOAT8_E4M3FN, PerTensor(), "float32")
ROWS = replace(WHOLE, granularity=PerChannel())
BLOCKS = replace(WHOLE, granularity=PerBlock(128, 128))


def problem(spec, sizes, activation, k=96, dtype="float32"):
    segments = tuple(SegmentSpec(size, spec) for size in sizes)
    return LinearProblem(k, segments, dtype, activation=read_activation(activation, "here"))


def weights(asked, seed=0):
    generator = np.random.default_rng(seed)
    return [make_weight(s.weight, s.out_features, asked.in_features, generator) for s in asked.segments]


def stored(*scales):
    return [ActivationParams(torch.tensor(scale, dtype=torch.float32)) for scale in scales]


def prepare(asked, params=None, **options):
    return KERNEL.prepare(asked, weights(asked), params or [None] * len(asked.segments), CPU, **options)


@pytest.mark.parametrize(
    ("spec", "sizes", "activation", "scales", "parts"),
    [
        (WHOLE, (64, 32), "float8_e4m3fn/tensor/static", (0.01, 0.01), 1),
        (WHOLE, (64, 32), "float8_e4m3fn/tensor/static", (0.01, 0.02), 2),
        (ROWS, (64, 32), "float8_e4m3fn/token/dynamic", None, 1),
        (BLOCKS, (256, 128, 40), "float8_e4m3fn/group128/dynamic", None, 1),
        (BLOCKS, (200, 128), "float8_e4m3fn/group128/dynamic", None, 2),
    ],
)
def test_segments_share_a_product_where_they_can(spec, sizes, activation, scales, parts):
    asked = problem(spec, sizes, activation)
    verdict = KERNEL.supports(asked, GPU)
    assert isinstance(verdict, Accepted)
    made = prepare(asked, None if scales is None else stored(*scales))
    assert made.meta["parts"] == parts
    assert [weight.out_features for weight in KERNEL.unprepare(made)] == list(sizes)
    entitled = sum(weight.codes.nbytes + weight.scales.nbytes for weight in weights(asked))
    assert made.nbytes <= entitled + verdict.extra_bytes


def test_equal_segments_may_not_become_different_ones_in_place():
    asked = problem(WHOLE, (64, 32), "float8_e4m3fn/tensor/static")
    made = prepare(asked, stored(0.01, 0.01))
    with pytest.raises(ValueError, match="make 2 parts of the layer, not 1 as before"):
        prepare(asked, stored(0.01, 0.02), out=made)


def test_a_stored_scale_that_is_missing_is_named():
    asked = problem(WHOLE, (64, 32), "float8_e4m3fn/tensor/static")
    with pytest.raises(ValueError, match="a stored scale of x is missing: "):
        prepare(asked, [*stored(0.01), None])


def test_scales_in_float64_are_rounded_and_have_no_way_back():
    asked = problem(ROWS, (32,), "float8_e4m3fn/token/dynamic")
    (weight,) = weights(asked)
    exact = replace(weight, scales=weight.scales.double() / 3)
    made = KERNEL.prepare(asked, [exact], [None], CPU)
    assert torch.equal(KERNEL.dequantize(made, torch.float32), exact.dequantize())
    with pytest.raises(NotImplementedError, match="holds float64 scales in float32"):
        KERNEL.unprepare(made)


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
