"""What the humming kernel takes and refuses, and what it says where the package is missing: without a GPU."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import ModuleType

import pytest

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
from quantplug_humming.kernel import HummingKernel
from quantplug_humming.probe import probe
from quantplug_testkit.conformance import LinearKernelConformance

KERNEL, GPU = HummingKernel(), Platform.parse("cuda:9.0")
INT4 = WeightSpec(ElementType.INT4, PerGroup(128), "float16")
FP8 = WeightSpec(ElementType.FLOAT8_E4M3FN, PerChannel(), "float32")
MX = WeightSpec(ElementType.FLOAT8_E4M3FN, PerGroup(32), "float8_e8m0fnu")
MXFP4 = replace(MX, element=ElementType.FLOAT4_E2M1FN)


def asked(weight=INT4, n=4096, k=4096, dtype="bfloat16", *, bias=False):
    return LinearProblem(k, (SegmentSpec(n, weight),), dtype, bias=bias)


@pytest.mark.parametrize(
    ("problem", "casts", "extra"),
    [
        (asked(), ("scales", "weights", "splits"), 0),
        (asked(k=128), ("scales", "weights", "splits"), 0),
        (asked(replace(INT4, scale_dtype="bfloat16")), ("weights", "splits"), 0),
        (asked(replace(INT4, element=ElementType.UINT4), bias=True), ("scales", "weights", "partials", "splits"), 0),
        (asked(replace(INT4, element=ElementType.INT8)), ("scales", "weights", "splits"), 0),
        (asked(FP8), ("scales", "partials", "splits"), 0),
        (asked(replace(FP8, granularity=PerTensor())), ("splits",), 0),
        (asked(replace(FP8, granularity=PerTensor()), bias=True), ("partials", "splits"), 4 * 4096),
        (asked(replace(FP8, granularity=PerBlock(128, 128))), ("scales", "weights", "splits"), 8192 * 32 - 4 * 32 * 32),
        (asked(MX), ("splits",), 0),
        (asked(MXFP4), ("splits",), 0),
        (asked(n=576, k=576), ("scales", "weights", "splits"), (640 * 640 - 576 * 576) // 2 + 2 * (640 * 5 - 576 * 5)),
    ],
)  # fmt: skip
def test_what_is_taken_declares_its_roundings(problem, casts, extra):
    verdict = KERNEL.supports(problem, GPU)
    assert isinstance(verdict, Accepted)
    assert verdict.casts == tuple(Cast(what, problem.dtype) for what in casts)
    assert verdict.extra_bytes == extra
    assert not verdict.quantizes_x


@pytest.mark.parametrize(
    ("problem", "platform", "code", "words"),
    [
        (asked(), "cpu", "platform", "not on cpu"),
        (asked(), "cuda:7.5", "arch", "7.5"),
        (asked(), "cuda:gfx942", "arch", "gfx942"),
        (asked(dtype="float32"), "cuda", "dtype", "float32"),
        (asked(dtype="float16"), "cuda", "dtype", "float16"),
        (asked(replace(INT4, element=ElementType.UINT8)), "cuda", "element", "codes are uint8"),
        (asked(replace(INT4, act_order=True)), "cuda", "act_order", "g_idx"),
        (asked(replace(FP8, scale_dtype="float8_e4m3fn")), "cuda", "dtype", "scales in float8_e4m3fn"),
        (asked(replace(FP8, global_scale=True)), "cuda", "dtype", "a global scale"),
        (asked(replace(INT4, granularity=PerGroup(48))), "cuda", "granularity", "groups of 48"),
        (asked(replace(FP8, granularity=PerBlock(64, 128))), "cuda", "granularity", "blocks of 64 x 128"),
        (asked(WeightSpec(ElementType.UINT4, PerChannel())), "cuda", "granularity", "uint4 per channel"),
        (asked(replace(FP8, element=ElementType.FLOAT4_E2M1FN)), "cuda", "granularity", "float4_e2m1fn per channel"),
        (asked(k=0), "cuda", "shape", "in_features is 0"),
        (replace(asked(), segments=(SegmentSpec(64, INT4), SegmentSpec(64, FP8))), "cuda", "segments", "differ"),
    ],
)
def test_a_refusal_names_what_failed(problem, platform, code, words):
    verdict = KERNEL.supports(problem, Platform.parse(platform))
    assert isinstance(verdict, Rejected)
    assert verdict.code == code
    assert words in verdict.reason
    assert verdict.fix or code == "platform"


def test_verdicts_keep_the_contract_on_every_question():
    tests = LinearKernelConformance()
    tests.kernel, tests.platform = KERNEL, GPU
    tests.test_refusing_names_the_offending_value()
    tests.test_accepting_is_well_formed()
    tests.test_supports_imports_nothing_foreign()


def test_the_probe_says_that_the_package_is_missing(monkeypatch):
    assert KERNEL.probe(Platform.parse("cpu")) is None
    monkeypatch.setitem(sys.modules, "humming", None)
    refusal = probe.__wrapped__()
    assert refusal is not None
    assert (refusal.code, refusal.fix) == ("dependency", "pip install humming-kernels")


@pytest.mark.parametrize(("version", "words"), [("0.2.0", "is 0.2.0"), (None, "of an unknown version")])
def test_another_version_is_refused(monkeypatch, version, words):
    package = ModuleType("humming")
    if version is not None:
        package.__version__ = version
    monkeypatch.setitem(sys.modules, "humming", package)
    refusal = probe.__wrapped__()
    assert refusal is not None
    assert words in refusal.reason
    package.__version__ = "0.1.19"
    assert probe.__wrapped__() is None


def test_the_kernel_is_found_by_its_entry_point():
    from quantplug.plugins import registry

    assert registry().kernel("humming.w16").plugin == "quantplug-humming"
