"""4-bit floating-point weights as integers: every code, every scale that fits, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cpu_layers import CPU, Layer, problem, spec, weights

from quantplug.codes import FLOAT4_E2M1FN_VALUES
from quantplug.kernel import Accepted, Cast, Rejected
from quantplug.spec import LinearProblem, PerBlock, PerChannel
from quantplug.weight import Weight
from quantplug_cpu.doubled import doubled
from quantplug_cpu.float4 import Float4Kernel

FLOAT4 = Float4Kernel()
MXFP4 = spec("float4_e2m1fn", 32, scales="float8_e8m0fnu")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("exponent", [-8, 0, 5])
def test_every_code_has_its_exact_value(exponent: int, dtype: str) -> None:
    codes = (torch.arange(64) % 16).to(torch.uint8).view(1, 64)
    given = Weight(codes, torch.full((1, 2), 2.0**exponent).to(torch.float8_e8m0fnu), MXFP4)
    layer = Layer.of(FLOAT4, problem(MXFP4, 1, 64, dtype), (given,))
    values = (torch.tensor(FLOAT4_E2M1FN_VALUES * 4) * 2.0**exponent).to(getattr(torch, dtype)).view(1, 64) + 0
    assert torch.equal(FLOAT4.dequantize(layer.prepared, values.dtype), values)
    identity = torch.eye(64, dtype=values.dtype)
    for rows in (1, 64):
        found = torch.cat([FLOAT4.apply(x, layer.prepared, None) for x in identity.split(rows)])
        assert torch.equal(found, values.t())


def test_doubling_is_exact_for_weights_of_any_stride() -> None:
    (given,) = weights(problem(MXFP4, 40, 96))
    twice = doubled(replace(given, codes=given.codes.t().contiguous().t()))
    assert torch.equal(twice.dequantize(), given.dequantize())


@pytest.mark.parametrize("rows", [1, 5, 64])
def test_layers_of_several_segments_and_shapes_are_right(rows: int) -> None:
    for kind, n, k in (
        (MXFP4, (33, 7), 80),
        (spec("float4_e2m1fn", 64, scales="float8_e4m3fn", global_scale=True), 48, 128),
        (spec("float4_e2m1fn", PerChannel(), scales="float32"), 16, 50),
    ):
        layer = Layer.of(FLOAT4, problem(kind, n, k, bias=True))
        layer.check(layer.inputs(rows), torch.randn(layer.problem.out_features).to(torch.bfloat16))


def test_only_scales_that_bfloat16_does_not_hold_are_rounded() -> None:
    rounded, scales = Cast("weights", "bfloat16"), Cast("scales", "bfloat16")
    nvidia = spec("float4_e2m1fn", 64, scales="float8_e4m3fn", global_scale=True)
    for kind, casts in (
        (MXFP4, (rounded,)),
        (spec("float4_e2m1fn", 64, scales="float8_e4m3fn"), (rounded,)),
        (nvidia, (scales, rounded)),
        (spec("float4_e2m1fn", 64, scales="float32"), (scales, rounded)),
    ):
        verdict = FLOAT4.supports(problem(kind, 64, 128), CPU)
        assert isinstance(verdict, Accepted)
        assert verdict.casts == casts


def test_a_scale_that_would_overflow_is_refused_before_anything_is_packed() -> None:
    (given,) = weights(problem(MXFP4, 4, 32))
    for exponent, fits in ((123, True), (124, False)):
        large = replace(given, scales=torch.full((4, 1), 2.0**exponent).to(torch.float8_e8m0fnu))
        if fits:
            layer = Layer.of(FLOAT4, problem(MXFP4, 4, 32), (large,))
            assert bool(FLOAT4.apply(torch.zeros(1, 32, dtype=torch.bfloat16), layer.prepared, None).isfinite().all())
        else:
            with pytest.raises(ValueError, match=r"the largest scale is 2\.1\d+e\+37, more than 1\.06\d+e\+37"):
                Layer.of(FLOAT4, problem(MXFP4, 4, 32), (large,))


@pytest.mark.parametrize(
    ("asked", "code", "reason", "fix"),
    [
        (
            problem(spec("float4_e2m1fn", 16, scales="float8_e4m3fn", global_scale=True), 64, 128),
            "granularity",
            "groups of 16 inputs would be filled up to 32 each",
            "cpu.dense takes any",
        ),
        (problem(spec("float8_e4m3fn", 32), 64, 128), "element", "codes are float8_e4m3fn", "cpu.dense takes them"),
        (problem(spec("uint4", 32), 64, 128), "element", "codes are uint4", "cpu.int4 takes them"),
        (problem(spec("int8", 32), 64, 128), "element", "codes are int8", "cpu.int8 takes them"),
        (problem(spec("float4_e2m1fn", 32, scales="float64"), 64, 128), "dtype", "scales in float64", "float32"),
        (problem(spec("float4_e2m1fn", PerBlock(8, 32)), 64, 128), "granularity", "blocks of 8 x 32", "cpu.dense"),
    ],
)
def test_a_refusal_says_who_takes_it(asked: LinearProblem, code: str, reason: str, fix: str) -> None:
    refusal = FLOAT4.supports(asked, CPU)
    assert isinstance(refusal, Rejected)
    assert (refusal.code, reason in refusal.reason, fix in refusal.fix) == (code, True, True), refusal


def test_negative_zero_has_no_way_back_and_none_is_claimed() -> None:
    layer = Layer.of(FLOAT4, problem(MXFP4, 4, 32))
    with pytest.raises(NotImplementedError, match="no way back"):
        FLOAT4.unprepare(layer.prepared)
