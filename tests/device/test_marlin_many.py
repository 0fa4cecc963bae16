"""The CUDA C++ kernel with so many rows that the tensor cores matter: every form, cut as layers of many shapes are."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from quantplug.spec import ElementType, LinearProblem, PerBlock, PerChannel, PerGroup, SegmentSpec, WeightSpec
from quantplug_testkit.bounds import linear_bound
from quantplug_testkit.canonical import make_weight, segment_of, to_float64
from quantplug_testkit.compare import assert_bitwise_equal, assert_within
from quantplug_testkit.oracles.linear import linear

if not torch.cuda.is_available() or torch.version.hip:
    pytest.skip("needs an NVIDIA GPU: torch.cuda.is_available() is False here", allow_module_level=True)

from quantplug_marlin import launch
from quantplug_marlin.calls import form_of_part
from quantplug_marlin.choice import group_cut
from quantplug_marlin.device import target_of
from quantplug_marlin.kernel import MarlinKernel

KERNEL = MarlinKernel()
SPECS = {
    "int4 g128": WeightSpec(ElementType.INT4, PerGroup(128)),
    "uint4 g32": WeightSpec(ElementType.UINT4, PerGroup(32), "bfloat16"),
    "uint4 g48": WeightSpec(ElementType.UINT4, PerGroup(48)),
    "uint4 channel": WeightSpec(ElementType.UINT4, PerChannel()),
    "int8 channel": WeightSpec(ElementType.INT8, PerChannel()),
    "uint8 g64": WeightSpec(ElementType.UINT8, PerGroup(64), "float32"),
    "fp8 channel": WeightSpec(ElementType.FLOAT8_E4M3FN, PerChannel(), "float32"),
    "fp8 block": WeightSpec(ElementType.FLOAT8_E4M3FN, PerBlock(128, 128), "float32"),
    "mxfp8": WeightSpec(ElementType.FLOAT8_E4M3FN, PerGroup(32), "float8_e8m0fnu"),
    "mxfp8 e5m2": WeightSpec(ElementType.FLOAT8_E5M2, PerGroup(32), "float8_e8m0fnu"),
    "mxfp4": WeightSpec(ElementType.FLOAT4_E2M1FN, PerGroup(32), "float8_e8m0fnu"),
    "nvfp4": WeightSpec(ElementType.FLOAT4_E2M1FN, PerGroup(16), "float8_e4m3fn", global_scale=True),
}
N = 328
"""21 tiles, the last of which is half empty."""


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("k", [512, 1088, 1152], ids="K={}".format)
@pytest.mark.parametrize("name", SPECS)
def test_many_rows_are_within_the_bound(name: str, k: int, dtype: str) -> None:
    """Chunks of 64 inputs in number divisible by eight, odd, and twice an odd number."""
    spec, generator = SPECS[name], np.random.default_rng(k)
    weight = make_weight(spec, N, k, generator)
    prepared = KERNEL.prepare(LinearProblem(k, (SegmentSpec(N, spec),), dtype), [weight], [None], torch.device("cuda"))
    x = torch.randn(300, k, device="cuda").to(getattr(torch, dtype))
    bias = torch.randn(N, device="cuda").to(x.dtype)
    segment, rows = segment_of(weight), to_float64(x)
    wanted = linear(rows, segment.values(), to_float64(bias))
    bound = linear_bound(rows, [segment], to_float64(bias), dtype)
    for count in (33, 130, 300):
        y = KERNEL.apply(x[:count], prepared, bias)
        assert_within(y, wanted[:count], bound[:count], f"{name}, {count} rows")
    if not target_of(0).warpgroups:
        return
    form, target, held = form_of_part(prepared, 0), target_of(0), prepared.tensors
    codes = held["codes.0"]
    stream = torch.cuda.current_stream().cuda_stream
    plain = form.exact or not form.parts
    for groups, tokens, shares in ((1, 64, 1), (2, 64, 2), (2, 128, 1), (1, 128, 2), *([(2, 256, 1)] if plain else [])):
        cut = group_cut(form, groups, tokens, codes.shape[1], shares, target)
        if shares == 1:
            cut = cut._replace(most=3)  # so that blocks take several pieces
        way = launch.way(form, cut, N, codes.shape[0], codes.shape[1], 300, 0, stream)
        y = torch.full((300, N), torch.nan, dtype=x.dtype, device="cuda")
        launch.run(way, x, codes, *(held.get(f"{part}.0") for part in ("scales", "zeros", "factor")), bias, y)
        assert_within(y, wanted, bound, f"{name}, {cut}")
        again = torch.full_like(y, torch.nan)
        launch.run(way, x, codes, *(held.get(f"{part}.0") for part in ("scales", "zeros", "factor")), bias, again)
        assert_bitwise_equal(again, y, "the same again")


@pytest.mark.parametrize("exponent", [-120, 30])
def test_scales_that_cannot_multiply_codes_exactly_multiply_sums(exponent: int) -> None:
    spec, k = SPECS["mxfp8"], 256
    weight = make_weight(spec, N, k, np.random.default_rng(0))
    scales = torch.full_like(weight.scales.to(torch.float32), 2.0**exponent).to(weight.scales.dtype)
    weight = replace(weight, scales=scales)
    prepared = KERNEL.prepare(
        LinearProblem(k, (SegmentSpec(N, spec),), "bfloat16"), [weight], [None], torch.device("cuda")
    )
    assert not form_of_part(prepared, 0).exact
    x = torch.randn(100, k, device="cuda").to(torch.bfloat16)
    segment, rows = segment_of(weight), to_float64(x)
    y = KERNEL.apply(x, prepared, None)
    assert_within(y, linear(rows, segment.values()), linear_bound(rows, [segment], None, "bfloat16"), f"2^{exponent}")
