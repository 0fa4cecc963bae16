"""What the Triton kernel for a quantized x takes and refuses: the same answer on any machine, without a GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest

from quantplug.activations import read_activation
from quantplug.kernel import Accepted, Cast, Rejected
from quantplug.platform import Platform
from quantplug.spec import (
    ElementType,
    LinearProblem,
    PerBlock,
    PerChannel,
    PerGroup,
    PerTensor,
    SegmentSpec,
    WeightSpec,
)
from quantplug_testkit.conformance import LinearKernelConformance
from quantplug_triton.w8a8 import TritonQuantizedKernel
from quantplug_triton.w8a8fit import chunks_of

KERNEL = TritonQuantizedKernel()
FLOAT8 = WeightSpec(ElementType.FLOAT8_E4M3FN, PerChannel(), "float32")
BLOCKS = replace(FLOAT8, granularity=PerBlock(128, 128))
INT8 = replace(FLOAT8, element=ElementType.INT8)
MXFP8 = WeightSpec(ElementType.FLOAT8_E4M3FN, PerGroup(32), "float8_e8m0fnu")
MXFP4 = replace(MXFP8, element=ElementType.FLOAT4_E2M1FN)
TOKEN, GROUP, STATIC = "float8_e4m3fn/token/dynamic", "float8_e4m3fn/group128/dynamic", "float8_e4m3fn/tensor/static"
MX = "float8_e4m3fn/group32/dynamic/float8_e8m0fnu"


def asked(weight=FLOAT8, activation=TOKEN, n=4096, k=4096, dtype="bfloat16"):
    return LinearProblem(k, (SegmentSpec(n, weight),), dtype, activation=read_activation(activation, "here"))


TAKEN = [
    (asked(), 0),
    (asked(replace(FLOAT8, granularity=PerTensor()), STATIC), 4),
    (asked(replace(FLOAT8, element=ElementType.FLOAT8_E5M2), "float8_e5m2/token/dynamic"), 0),
    (asked(BLOCKS, GROUP), 0),
    (asked(replace(BLOCKS, scale_dtype="float8_e8m0fnu"), f"{GROUP}/float8_e8m0fnu"), 0),
    (asked(activation=GROUP), 0),
    (asked(MXFP8, MX), 0),
    (asked(MXFP4, MX), 0),
    (asked(MXFP4, "float4_e2m1fn/group32/dynamic/float8_e8m0fnu"), 0),
    (asked(MXFP4, TOKEN), 0),
    (asked(WeightSpec(ElementType.INT4, PerGroup(128), "bfloat16")), 0),
    (asked(n=33, k=61), 33 * 3),
    (asked(MXFP4, MX, 40, 96), 40 * 16),
]


@pytest.mark.parametrize(("problem", "extra"), TAKEN)
@pytest.mark.parametrize(
    ("platform", "short"),
    [("cuda", True), ("cuda:8.9", True), ("cuda:9.0", True), ("cuda:8.0", False), ("cuda:10.0", False),
     ("cuda:gfx942", False)],
)  # fmt: skip
def test_what_is_taken_quantizes_x_and_declares_short_sums_where_there_are_any(problem, extra, platform, short):
    verdict = KERNEL.supports(problem, Platform.parse(platform))
    assert isinstance(verdict, Accepted)
    assert verdict.quantizes_x
    assert verdict.casts == ((Cast("accumulator", "float22_e8m13"),) if short else ())
    assert verdict.extra_bytes == extra


@pytest.mark.parametrize("weight", [INT8, replace(INT8, element=ElementType.INT4, granularity=PerGroup(64))])
def test_integers_are_summed_exactly(weight):
    for platform in ("cuda:8.0", "cuda:9.0"):
        verdict = KERNEL.supports(asked(weight, "int8/token/dynamic"), Platform.parse(platform))
        assert isinstance(verdict, Accepted)
        assert verdict.casts == ()


@pytest.mark.parametrize(
    ("problem", "chunk", "per_group", "slots"),
    [
        (asked(), 128, 32, 4096),
        (asked(k=576), 64, 9, 576),
        (asked(k=61), 64, 1, 64),
        (asked(BLOCKS, GROUP, k=200), 128, 1, 256),
        (asked(MXFP4, MX, k=96), 32, 1, 128),
        (asked(replace(FLOAT8, granularity=PerGroup(64))), 64, 1, 4096),
    ],
)
def test_chunks_lie_within_groups_of_both(problem, chunk, per_group, slots):
    chunks = chunks_of(problem)
    assert (chunks.size, chunks.per_group, chunks.slots(problem.in_features)) == (chunk, per_group, slots)


@pytest.mark.parametrize(
    ("problem", "platform", "code", "words"),
    [
        (asked(), "cpu", "platform", "not on cpu"),
        (asked(), "cuda:7.5", "arch", "7.5"),
        (asked(dtype="float64"), "cuda", "dtype", "float64"),
        (asked(replace(FLOAT8, element=ElementType.FLOAT8_E4M3FNUZ)), "cuda", "element", "float8_e4m3fnuz"),
        (asked(INT8), "cuda", "element", "codes are int8, and x is float8_e4m3fn"),
        (asked(activation="int8/token/dynamic"), "cuda", "element", "codes are float8_e4m3fn, and x is int8"),
        (asked(replace(FLOAT8, element=ElementType.UINT4)), "cuda", "element", "codes are uint4"),
        (asked(replace(FLOAT8, act_order=True)), "cuda", "act_order", "g_idx"),
        (asked(replace(FLOAT8, global_scale=True)), "cuda", "dtype", "a global scale"),
        (asked(replace(FLOAT8, scale_dtype="float64")), "cuda", "dtype", "float64"),
        (asked(k=0), "cuda", "shape", "in_features is 0"),
        (asked(n=0), "cuda", "shape", "out_features is 0"),
        (asked(INT8, "int8/token/dynamic", k=131072), "cuda", "shape", "in_features 131072"),
        (asked(activation="none"), "cuda", "activation", "permits none"),
        (asked(INT8, "uint8/tensor/static"), "cuda", "activation", "uint8 per tensor, static"),
        (asked(activation="float8_e4m3fn/token/static"), "cuda", "activation", "per token, static"),
        (asked(activation="float8_e4m3fn/group48/dynamic"), "cuda", "activation", "group 48"),
        (asked(activation=f"{TOKEN}/float8_e8m0fnu"), "cuda", "activation", "scales in float8_e8m0fnu"),
        (asked(INT8, "int8/group32/dynamic/float8_e8m0fnu"), "cuda", "activation", "scales in float8_e8m0fnu"),
        (asked(activation="float4_e2m1fn/group16/dynamic/float8_e4m3fn+global"), "cuda", "activation", "float8_e4m3fn"),
        (asked(replace(FLOAT8, granularity=PerGroup(48))), "cuda", "granularity", "group 48"),
        (asked(replace(FLOAT8, granularity=PerGroup(64)), GROUP), "cuda", "granularity", "group 64"),
        (
            replace(asked(), segments=(SegmentSpec(64, FLOAT8), SegmentSpec(64, BLOCKS))),
            "cuda", "segments", "differ",
        ),
    ],
)  # fmt: skip
def test_a_refusal_names_what_failed(problem, platform, code, words):
    verdict = KERNEL.supports(problem, Platform.parse(platform))
    assert isinstance(verdict, Rejected)
    assert verdict.code == code
    assert words in verdict.reason
    assert verdict.fix or code == "platform"


def test_the_kernel_is_found_by_its_entry_point():
    from quantplug.plugins import registry

    assert registry().kernel("triton.w8a8").plugin == "quantplug-triton"


def test_verdicts_keep_the_contract_on_every_question():
    tests = LinearKernelConformance()
    tests.kernel, tests.platform = KERNEL, Platform.parse("cuda:9.0")
    tests.test_refusing_names_the_offending_value()
    tests.test_accepting_is_well_formed()
    tests.test_supports_imports_nothing_foreign()
