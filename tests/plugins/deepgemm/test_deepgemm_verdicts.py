"""What the DeepGEMM kernel takes and refuses, and what it claims: the same answer without a GPU and the package."""

from __future__ import annotations

import sys
from dataclasses import replace

import deepgemm_stand_in
import pytest

from quantplug.activations import read_activation
from quantplug.kernel import Accepted, Cast, Rejected
from quantplug.platform import Platform
from quantplug.plugins import registry
from quantplug.spec import ElementType, LinearProblem, PerBlock, PerChannel, SegmentSpec, WeightSpec
from quantplug_deepgemm.kernel import DeepGemmKernel
from quantplug_deepgemm.probe import probe
from quantplug_testkit.conformance import LinearKernelConformance

KERNEL, GPU = DeepGemmKernel(), Platform.parse("cuda:9.0")
BLOCKS = WeightSpec(ElementType.FLOAT8_E4M3FN, PerBlock(128, 128), "float32")
ROWS = replace(BLOCKS, granularity=PerChannel())
GROUP = "float8_e4m3fn/group128/dynamic"
LAYERS = ((4096, 4096), (28672, 4096), (4096, 14336), (8192, 8192))
"""N and K of the benchmark's layers."""


def asked(weight=BLOCKS, activation=GROUP, n=4096, k=4096, dtype="bfloat16", bias=False):
    return LinearProblem(k, (SegmentSpec(n, weight),), dtype, bias, read_activation(activation, "here"))


def accepted(problem, kernel=KERNEL):
    verdict = kernel.supports(problem, GPU)
    assert isinstance(verdict, Accepted)
    return verdict


@pytest.mark.parametrize("platform", ["cuda", "cuda:9.0"])
def test_what_is_taken_quantizes_x_and_declares_its_sums(platform):
    verdict = KERNEL.supports(asked(), Platform.parse(platform))
    assert isinstance(verdict, Accepted)
    assert verdict.quantizes_x
    assert verdict.casts == (Cast("accumulator", "float22_e8m13"),)
    assert (verdict.extra_bytes, verdict.notes) == (0, ())


def test_a_bias_is_added_to_a_product_that_was_rounded():
    assert accepted(asked(bias=True)).casts == (Cast("accumulator", "float22_e8m13"), Cast("partials", "bfloat16"))


def test_odd_sizes_are_filled_up():
    verdict = accepted(asked(n=570, k=576))
    assert verdict.notes == ("K is filled up to 1024",)
    assert verdict.extra_bytes == 576 * 1024 - 570 * 576 + 4 * (5 * 8 - 5 * 5)


@pytest.mark.parametrize(
    ("problem", "platform", "code", "words"),
    [
        (asked(), "cpu", "platform", "not on cpu"),
        (asked(), "cuda:8.9", "arch", "8.9"),
        (asked(), "cuda:10.0", "arch", "10.0"),
        (asked(dtype="float16"), "cuda:9.0", "dtype", "float16"),
        (asked(dtype="float32"), "cuda:9.0", "dtype", "float32"),
        (asked(ROWS, "float8_e4m3fn/token/dynamic"), "cuda:9.0", "granularity", "per channel"),
        (asked(ROWS, "float8_e4m3fn/tensor/static"), "cuda:9.0", "granularity", "per channel"),
        (asked(replace(BLOCKS, granularity=PerBlock(64, 128))), "cuda:9.0", "granularity", "blocks of 64 x 128"),
        (asked(replace(BLOCKS, element=ElementType.FLOAT8_E5M2)), "cuda:9.0", "activation", "for float8_e5m2"),
        (asked(replace(BLOCKS, scale_dtype="float8_e8m0fnu")), "cuda:9.0", "dtype", "float8_e8m0fnu"),
        (asked(activation="none"), "cuda:9.0", "activation", "none"),
        (asked(activation="float8_e4m3fn/token/dynamic"), "cuda:9.0", "activation", "per token"),
        (asked(activation="float8_e4m3fn/tensor/static"), "cuda:9.0", "activation", "static"),
        (asked(n=0), "cuda:9.0", "shape", "out_features is 0"),
        (
            replace(asked(), segments=(SegmentSpec(128, BLOCKS), SegmentSpec(128, ROWS))),
            "cuda:9.0", "segments", "differ",
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
    assert registry().kernel("deepgemm.w8a8").plugin == "quantplug-deepgemm"


def test_verdicts_keep_the_contract_on_every_question():
    tests = LinearKernelConformance()
    tests.kernel, tests.platform = KERNEL, GPU
    tests.test_refusing_names_the_offending_value()
    tests.test_accepting_is_well_formed()
    tests.test_supports_imports_nothing_foreign()


@pytest.mark.parametrize(("n", "k"), LAYERS)
def test_claims_leave_few_rows_to_who_reads_faster_and_take_many(n, k):
    """Of kernels that share the copy, in the order in which they were measured: see the plugin's README.md."""
    marlin, cublas = (registry().kernel(name).item for name in ("marlin.w8.rows", "cublas.w8a8"))
    ours, few, other = (accepted(asked(n=n, k=k), kernel).cost for kernel in (KERNEL, marlin, cublas))
    assert KERNEL.layout_id == marlin.layout_id == cublas.layout_id
    assert all(few.at(rows) < ours.at(rows) for rows in (1, 4, 16))
    assert all(ours.at(rows) < min(few.at(rows), other.at(rows)) for rows in (128, 2048, 8192))


@pytest.fixture
def forgotten():
    probe.cache_clear()
    yield
    probe.cache_clear()


@pytest.mark.usefixtures("forgotten")
@pytest.mark.parametrize(
    ("found", "words"),
    [(None, "cannot be imported"), ("2.5.0", "deep_gemm is 2.5.0"), ("", "of an unknown version")],
)
def test_the_probe_says_what_is_missing(found, words, monkeypatch):
    module = None if found is None else deepgemm_stand_in.module()
    if module is not None:
        module.__version__ = found
    monkeypatch.setitem(sys.modules, "deep_gemm", module)
    refusal = KERNEL.probe(GPU)
    assert isinstance(refusal, Rejected)
    assert refusal.code == "dependency"
    assert words in refusal.reason
    assert "sgl-deep-gemm" in refusal.fix
    assert KERNEL.probe(Platform.parse("cpu")) is None
