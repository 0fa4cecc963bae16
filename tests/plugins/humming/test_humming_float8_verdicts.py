"""What the humming kernels for experts in FP8 take and refuse: without a GPU."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from quantplug.activations import read_activation
from quantplug.kernel import Accepted, Cast, Rejected
from quantplug.moe import ExpertFunction, MoEProblem
from quantplug.platform import Platform
from quantplug.plugins import registry
from quantplug.spec import ElementType, PerBlock, PerChannel, PerGroup, PerTensor, WeightSpec
from quantplug_humming.choice import choose
from quantplug_humming.expertfit import forms_of
from quantplug_humming.experts import HummingExperts
from quantplug_humming.float8experts import FastFloat8HummingExperts, Float8HummingExperts
from quantplug_testkit.conformance.contract import ContractTests
from quantplug_testkit.conformance.experts.case import ExpertSubject

KERNELS = KERNEL, FAST = Float8HummingExperts(), FastFloat8HummingExperts()
GPU = Platform.parse("cuda:9.0")
ROWS = WeightSpec(ElementType.FLOAT8_E4M3FN, PerChannel(), "float32")
WHOLE = replace(ROWS, granularity=PerTensor())
BLOCKS = replace(ROWS, granularity=PerBlock(128, 128))
TOKEN = read_activation("float8_e4m3fn/token/dynamic", "here")
GROUP = read_activation("float8_e4m3fn/group128/dynamic", "here")
PROBLEM = MoEProblem(8, 2, 256, 128, (ROWS, ROWS), ROWS, ExpertFunction(), "bfloat16", activation=TOKEN)
IN_BLOCKS = replace(PROBLEM, w13=(BLOCKS, BLOCKS), w2=BLOCKS, activation=GROUP)
ALWAYS = ("splits", "gate_up", "expert")


class TestAnswersAboutFloat8Experts(ExpertSubject, ContractTests):
    kernel = KERNEL
    platform = GPU
    test_probe_passes_on_this_machine = None  # which is any machine here


@pytest.mark.parametrize(
    ("problem", "casts"),
    [
        (PROBLEM, ("scales", "partials")),
        (replace(PROBLEM, w13=(replace(ROWS, scale_dtype="bfloat16"),) * 2), ("scales", "partials")),
        (replace(PROBLEM, w13=(WHOLE,), w2=WHOLE, function=ExpertFunction("relu2", gated=False)), ()),
        (IN_BLOCKS, ()),
        (replace(IN_BLOCKS, bias=True), ("partials",)),
    ],
)
def test_what_is_taken_declares_its_roundings(problem, casts):
    verdict = KERNEL.supports(problem, GPU)
    assert isinstance(verdict, Accepted)
    assert verdict.quantizes_x
    assert sorted(cast.what for cast in verdict.casts) == sorted(("accumulator", *casts, *ALWAYS))
    assert Cast("accumulator", "float22_e8m13") in verdict.casts


def test_fast_sums_are_declared_and_chosen_by_request_only():
    verdict = FAST.supports(PROBLEM, GPU)
    assert Cast("long_accumulator", "float22_e8m13") in verdict.casts
    assert FAST.traits.by_request
    assert not KERNEL.traits.by_request
    assert FAST.layout_id == KERNEL.layout_id
    assert verdict.cost.at(4096) < KERNEL.supports(PROBLEM, GPU).cost.at(4096)


@pytest.mark.parametrize(
    ("changes", "code", "words"),
    [
        ({"w2": WeightSpec(ElementType.INT4, PerGroup(128), "float16")}, "element", "codes are int4"),
        ({"w2": replace(ROWS, element=ElementType.FLOAT8_E5M2)}, "element", "float8_e5m2"),
        ({"activation": None}, "activation", "the file permits none"),
        ({"activation": read_activation("float8_e4m3fn/tensor/static", "here")}, "activation", "per tensor, static"),
        ({"activation": read_activation("int8/token/dynamic", "here")}, "activation", "int8 per token"),
        ({"activation": read_activation("float8_e4m3fn/group64/dynamic", "here")}, "activation", "group 64"),
        ({"activation": GROUP}, "granularity", "for x per group 128"),
        ({"w2": BLOCKS}, "granularity", "blocks of 128 x 128 for x per token"),
        (
            {"w13": (BLOCKS, BLOCKS), "w2": BLOCKS, "activation": GROUP, "intermediate": 192},
            "shape",
            "intermediate 192",
        ),
        ({"w2": replace(ROWS, scale_dtype="float64")}, "dtype", "scales in float64"),
        ({"w13": (ROWS, WHOLE)}, "segments", "segments differ"),
        ({"hidden": 20000}, "shape", "hidden is 20000"),
        ({"dtype": "float16"}, "dtype", "float16"),
        ({"experts": 4096}, "shape", "4096 experts"),
    ],
)
def test_a_refusal_names_what_failed(changes, code, words):
    verdict = KERNEL.supports(replace(PROBLEM, **changes), GPU)
    assert isinstance(verdict, Rejected)
    assert verdict.code == code
    assert words in verdict.reason
    assert verdict.fix


def test_sums_are_known_for_hopper_and_blocks_have_none_that_are_fast():
    assert KERNEL.supports(PROBLEM, Platform.parse("cuda:8.9")).code == "arch"
    assert KERNEL.supports(PROBLEM, Platform.parse("cpu")).code == "platform"
    refusal = FAST.supports(IN_BLOCKS, GPU)
    assert (refusal.code, "not added up fast" in refusal.reason) == ("granularity", True)


def test_fast_sums_are_never_dearer_and_quantizing_x_pays_where_rows_are_many():
    qwen3, plain = replace(PROBLEM, experts=128, top_k=8, hidden=2048, intermediate=768), HummingExperts()
    for rows in (1, 4096):
        fast, precise, weights_alone = (kernel.supports(qwen3, GPU).cost.at(rows) for kernel in (FAST, KERNEL, plain))
        assert fast <= precise
        assert (precise < weights_alone) is (rows == 4096)


def test_many_rows_of_an_expert_are_multiplied_in_larger_blocks(stand_in, monkeypatch):
    own = {
        "block_shape": (80, 256, 128), "warp_shape": (80, 32, 128), "use_warp_spec": True, "use_stream_k": True,
        "num_stages": 4, "smem_reuse_mode": "none",
    }  # fmt: skip
    monkeypatch.setattr(stand_in.tune, "get_heuristics_config", lambda config, **asked: dict(own))
    forms = {kernel: forms_of(PROBLEM, float8=True)[0]._replace(promoted=int(kernel is KERNEL)) for kernel in KERNELS}
    for kernel, choices, block in (
        (KERNEL, 4088, (80, 256, 128)),
        (KERNEL, 4096, (160, 128, 128)),
        (FAST, 1528, (80, 256, 128)),
        (FAST, 1536, (128, 256, 128)),
        (FAST, 4096, (160, 256, 128)),
    ):
        choice = choose(forms[kernel], False, 8, choices, 0)
        kernel_of = json.loads(choice.tuning)
        assert (choice.rows, tuple(kernel_of["block_shape"])) == (block[0], block)
        assert kernel_of["use_stream_k"] == (block[0] == 80)
        assert kernel_of["warp_shape"] == [block[0], block[1] // 8, 128]
    in_blocks = forms_of(IN_BLOCKS, float8=True)[0]._replace(promoted=1)
    assert choose(in_blocks, False, 8, 4096, 0).rows == 80
    assert choose(forms_of(PROBLEM)[0], False, 8, 4096, 0).rows == 80


def test_what_is_held_is_declared():
    # codes as they are stored, scales of two bytes in place of four
    assert KERNEL.supports(PROBLEM, GPU).extra_bytes == 0
    odd = KERNEL.supports(replace(IN_BLOCKS, hidden=200), GPU)
    stored = 3 * 128 * 200 + 4 * (2 * 2 + 2)
    assert odd.extra_bytes == 8 * (256 * 256 + 256 * 128 + 4 * (2 * 2 + 2 * 1) - stored)


def test_the_kernels_are_found_by_their_entry_point():
    for kernel in (KERNEL, FAST):
        assert registry().moe_kernel(kernel.name).plugin == "quantplug-humming"
