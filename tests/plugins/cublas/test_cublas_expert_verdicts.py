"""What the cuBLAS kernels for experts take and refuse, and how they call torch: the same answer without a GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from quantplug.activations import read_activation
from quantplug.kernel import Accepted, Cast, Rejected
from quantplug.moe import ExpertFunction, MoEProblem
from quantplug.platform import Platform
from quantplug.spec import ElementType, PerBlock, PerChannel, WeightSpec
from quantplug_cublas import mixture
from quantplug_cublas.experts import CublasExperts, FastCublasExperts, _probe
from quantplug_testkit.conformance.contract import ContractTests
from quantplug_testkit.conformance.experts.case import ExpertSubject

KERNEL, GPU = CublasExperts(), Platform.parse("cuda:9.0")
ROWS = WeightSpec(ElementType.FLOAT8_E4M3FN, PerChannel(), "float32")
TOKEN, STATIC = "float8_e4m3fn/token/dynamic", "float8_e4m3fn/tensor/static"
PROBLEM = MoEProblem(
    8, 2, 128, 64, (ROWS, ROWS), ROWS, ExpertFunction(), "bfloat16", activation=read_activation(TOKEN, "here")
)


class TestAnswersAboutExperts(ExpertSubject, ContractTests):
    kernel = KERNEL
    platform = GPU
    test_probe_passes_on_this_machine = None  # which is any machine here


def test_what_is_taken_quantizes_x_and_declares_its_roundings():
    verdict = KERNEL.supports(PROBLEM, GPU)
    assert isinstance(verdict, Accepted)
    assert verdict.quantizes_x
    assert verdict.casts == (Cast("accumulator", "float22_e8m13"), Cast("partials", "bfloat16"))
    assert verdict.extra_bytes == 0
    fast = FastCublasExperts().supports(PROBLEM, GPU)
    assert isinstance(fast, Accepted)
    assert fast.casts == (Cast("long_accumulator", "float22_e8m13"), Cast("partials", "bfloat16"))
    assert verdict.cost.at(1) < fast.cost.at(4096) < verdict.cost.at(4096)
    static = KERNEL.supports(replace(PROBLEM, activation=read_activation(STATIC, "here")), Platform.parse("cuda"))
    assert isinstance(static, Accepted)
    assert static.notes == ("x is quantized twice, for gate and for up",)


@pytest.mark.parametrize(
    ("changes", "code", "words"),
    [
        ({"dtype": "float16"}, "dtype", "float16"),
        ({"experts": 1024}, "shape", "1024 experts"),
        ({"experts": 600, "activation": read_activation(STATIC, "here")}, "shape", "600 experts, 2 groups each"),
        ({"hidden": 0}, "shape", "hidden is 0"),
        ({"router_weight_on_input": True}, "shape", "top_k 2"),
        ({"w13": (ROWS,)}, "segments", "1 projections"),
        ({"w2": replace(ROWS, element=ElementType.FLOAT8_E5M2)}, "element", "float8_e5m2"),
        ({"w2": replace(ROWS, act_order=True)}, "act_order", "g_idx"),
        ({"w2": replace(ROWS, scale_dtype="float8_e8m0fnu")}, "dtype", "float8_e8m0fnu"),
        ({"w2": replace(ROWS, global_scale=True)}, "dtype", "global scale"),
        ({"w2": replace(ROWS, granularity=PerBlock(128, 128))}, "granularity", "blocks of 128 x 128"),
        ({"activation": None}, "activation", "none"),
        ({"activation": read_activation("float8_e4m3fn/tensor/dynamic", "here")}, "activation", "tensor, dynamic"),
        ({"activation": read_activation("float8_e5m2/token/dynamic", "here")}, "activation", "float8_e5m2"),
        ({"function": ExpertFunction("swish")}, "function", "swish"),
    ],
)
def test_a_refusal_names_what_failed(changes, code, words):
    verdict = KERNEL.supports(replace(PROBLEM, **changes), GPU)
    assert isinstance(verdict, Rejected)
    assert verdict.code == code
    assert words in verdict.reason


@pytest.mark.parametrize(("platform", "code"), [("cpu", "platform"), ("cuda:8.9", "arch"), ("cuda:10.0", "arch")])
def test_only_hopper_is_taken(platform, code):
    verdict = KERNEL.supports(PROBLEM, Platform.parse(platform))
    assert isinstance(verdict, Rejected)
    assert verdict.code == code


def test_the_kernel_is_found_by_its_entry_point():
    from quantplug.plugins import registry

    for name in ("cublas.moe", "cublas.moe.fast"):
        assert registry().moe_kernels[name].plugin == "quantplug-cublas"


@pytest.mark.parametrize(
    ("rows", "groups", "outputs", "inputs", "steps"),
    [
        (32768, 128, 1536, 2048, 2),
        (131072, 128, 1536, 2048, 8),
        (16384, 128, 1536, 2048, 1),  # 128 rows each: torch takes its tile for few
        (8192, 8, 28672, 4096, 1),  # two sizes of 2048 or more: the tile is small enough
        (60000, 8, 4096, 768, 1),  # so they are with so many rows
        (16384, 8, 1536, 512, 32),
        (16384, 8, 144, 512, 1),  # 144 outputs cannot be cut into 32
        (4000, 1, 1536, 512, 1),  # a single expert has nothing behind it
        (300, 2, 128, 64, 1),
    ],
)
def test_torchs_choice_of_a_tile_is_steered_by_groups_without_rows(rows, groups, outputs, inputs, steps):
    assert mixture._steps(rows, groups, outputs, inputs) == steps


def test_the_probe_says_what_is_missing(monkeypatch):
    assert KERNEL.probe(Platform.parse("cpu")) is None
    monkeypatch.delattr(torch, "_scaled_grouped_mm")
    refusal = _probe.__wrapped__()
    assert refusal is not None
    assert "has no operator _scaled_grouped_mm" in refusal.reason
