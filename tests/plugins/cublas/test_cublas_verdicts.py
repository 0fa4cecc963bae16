"""What the cuBLAS kernel takes and refuses: the same answer on any machine, without a GPU."""

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
from quantplug_cublas.kernel import CublasKernel, FastCublasKernel
from quantplug_testkit.conformance import LinearKernelConformance

KERNEL = CublasKernel()
WEIGHT = WeightSpec(ElementType.FLOAT8_E4M3FN, PerChannel(), "float32")
TOKEN, GROUP, STATIC = "float8_e4m3fn/token/dynamic", "float8_e4m3fn/group128/dynamic", "float8_e4m3fn/tensor/static"
BLOCKS = replace(WEIGHT, granularity=PerBlock(128, 128))


def asked(weight=WEIGHT, activation=TOKEN, n=4096, k=4096, dtype="bfloat16"):
    return LinearProblem(k, (SegmentSpec(n, weight),), dtype, activation=read_activation(activation, "here"))


@pytest.mark.parametrize("platform", ["cuda", "cuda:8.9", "cuda:9.0"])
@pytest.mark.parametrize(
    ("problem", "extra"),
    [
        (asked(), 4),
        (asked(replace(WEIGHT, granularity=PerTensor()), STATIC), 4),
        (asked(replace(WEIGHT, granularity=PerTensor()), "float8_e4m3fn/tensor/dynamic"), 0),
        (asked(replace(WEIGHT, element=ElementType.FLOAT8_E5M2)), 4),
        (asked(activation="float8_e5m2/token/dynamic"), 4),
        (asked(replace(WEIGHT, scale_dtype="bfloat16")), 4 + 2 * 4096),
        (asked(n=33, k=61), 48 * 64 - 33 * 61 + 4 * 15 + 4),
    ],
)
def test_what_is_taken_quantizes_x_and_declares_its_sums(problem, extra, platform):
    verdict = KERNEL.supports(problem, Platform.parse(platform))
    assert isinstance(verdict, Accepted)
    assert verdict.quantizes_x
    assert verdict.casts == (Cast("accumulator", "float22_e8m13"),)
    assert verdict.extra_bytes == extra


def test_fast_sums_are_declared_and_given_by_request_only():
    kernel, gpu = FastCublasKernel(), Platform.parse("cuda:9.0")
    assert kernel.traits.by_request
    assert kernel.layout_id == KERNEL.layout_id
    fast, precise = kernel.supports(asked(), gpu), KERNEL.supports(asked(), gpu)
    assert isinstance(fast, Accepted)
    assert isinstance(precise, Accepted)
    assert fast.casts == (Cast("long_accumulator", "float22_e8m13"),)
    assert fast.cost.at(4096) < precise.cost.at(4096)
    refusal = kernel.supports(asked(BLOCKS, GROUP), gpu)
    assert isinstance(refusal, Rejected)
    assert (refusal.code, refusal.reason) == ("granularity", "blocks of 128 x 128 are not added up fast")


def test_blocks_are_for_hopper_and_filled_up():
    verdict = KERNEL.supports(asked(BLOCKS, GROUP, 576, 576), Platform.parse("cuda:9.0"))
    assert isinstance(verdict, Accepted)
    assert verdict.notes == ("K is filled up to 1024",)
    assert verdict.extra_bytes == 576 * (1024 - 576) + 4 * (5 * 8 - 5 * 5)
    refusal = KERNEL.supports(asked(BLOCKS, GROUP), Platform.parse("cuda:8.9"))
    assert isinstance(refusal, Rejected)
    assert (refusal.code, refusal.reason) == ("arch", "blocks of weights on compute capability 8.9")


@pytest.mark.parametrize(
    ("problem", "platform", "code", "words"),
    [
        (asked(), "cpu", "platform", "not on cpu"),
        (asked(), "cuda:8.0", "arch", "8.0"),
        (asked(), "cuda:10.0", "arch", "10.0"),
        (asked(), "cuda:gfx942", "arch", "gfx942"),
        (asked(dtype="float64"), "cuda", "dtype", "float64"),
        (asked(replace(WEIGHT, element=ElementType.INT8)), "cuda", "element", "codes are int8"),
        (asked(replace(WEIGHT, element=ElementType.FLOAT8_E4M3FNUZ)), "cuda", "element", "float8_e4m3fnuz"),
        (asked(replace(WEIGHT, act_order=True)), "cuda", "act_order", "g_idx"),
        (asked(replace(WEIGHT, scale_dtype="float8_e8m0fnu")), "cuda", "dtype", "float8_e8m0fnu"),
        (asked(replace(WEIGHT, global_scale=True)), "cuda", "dtype", "a global scale"),
        (asked(replace(WEIGHT, granularity=PerGroup(128))), "cuda", "granularity", "group 128"),
        (asked(replace(WEIGHT, granularity=PerBlock(64, 128)), GROUP), "cuda", "granularity", "blocks of 64 x 128"),
        (asked(k=0), "cuda", "shape", "in_features is 0"),
        (asked(n=0), "cuda", "shape", "out_features is 0"),
        (asked(activation="none"), "cuda", "activation", "none"),
        (asked(activation=GROUP), "cuda", "activation", "group 128, dynamic for float8_e4m3fn per channel"),
        (asked(BLOCKS), "cuda", "activation", "per token, dynamic for float8_e4m3fn block"),
        (asked(BLOCKS, "float8_e4m3fn/group64/dynamic"), "cuda", "activation", "group 64"),
        (asked(activation="float8_e4m3fn/token/static"), "cuda", "activation", "per token, static"),
        (asked(activation="int8/token/dynamic"), "cuda", "activation", "int8 per token"),
        (asked(activation="float8_e4m3fn/group32/dynamic/float8_e8m0fnu"), "cuda", "activation", "group 32"),
        (
            asked(replace(WEIGHT, element=ElementType.FLOAT8_E5M2), "float8_e5m2/token/dynamic"),
            "cuda", "activation", "float8_e5m2 for float8_e5m2",
        ),
        (
            asked(replace(BLOCKS, element=ElementType.FLOAT8_E5M2), GROUP),
            "cuda", "activation", "float8_e4m3fn for float8_e5m2",
        ),
        (
            replace(asked(), segments=(SegmentSpec(64, WEIGHT), SegmentSpec(64, BLOCKS))),
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


def test_the_kernels_are_found_by_their_entry_point():
    from quantplug.plugins import registry

    for name in ("cublas.w8a8", "cublas.w8a8.fast"):
        assert registry().kernel(name).plugin == "quantplug-cublas"
    assert "cublas.w8a8.dense" in registry().kernels
    assert "cublas.w8a8.fast.dense" not in registry().kernels


@pytest.mark.parametrize("kernel", [KERNEL, FastCublasKernel()], ids=lambda kernel: kernel.name)
def test_verdicts_keep_the_contract_on_every_question(kernel):
    tests = LinearKernelConformance()
    tests.kernel, tests.platform = kernel, Platform.parse("cuda:9.0")
    tests.test_refusing_names_the_offending_value()
    tests.test_accepting_is_well_formed()
    tests.test_supports_imports_nothing_foreign()
