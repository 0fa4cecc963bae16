"""What the CPU kernels say about problems, and how the plugin is found."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from cpu_layers import CPU, problem, spec

from quantplug.kernel import Accepted, Cast, Rejected
from quantplug.platform import Platform
from quantplug.plugins import discover
from quantplug.reference import ReferenceKernel
from quantplug.spec import ElementType, LinearProblem, PerBlock, PerChannel, PerTensor, SegmentSpec, WeightSpec
from quantplug_cpu import int8 as int8_module
from quantplug_cpu.int4 import Int4Kernel
from quantplug_cpu.int8 import Int8Kernel
from quantplug_cpu.slots import Slots, arrange, group_sizes

FOUR, EIGHT = Int4Kernel(), Int8Kernel()
BFLOAT16 = "bfloat16"


def accepted(kernel: Int4Kernel | Int8Kernel, asked: LinearProblem) -> Accepted:
    verdict = kernel.supports(asked, CPU)
    assert isinstance(verdict, Accepted), verdict
    return verdict


REFUSED = [
    (FOUR, problem(spec("int4", 32), 8, 32), "cuda:9.0", "platform", "runs on cpu, not on cuda:9.0", ""),
    (
        FOUR,
        problem(spec("int4", 32), 8, 32, "float64"),
        "cpu",
        "dtype",
        "activation dtype float64",
        "use one of bfloat16",
    ),
    (FOUR, problem(spec("int8", 32), 8, 32), "cpu", "element", "int8 has 8 bits", "cpu.int8 takes it"),
    (EIGHT, problem(spec("uint4", 32), 8, 32), "cpu", "element", "uint4 has 4 bits", "cpu.int4 takes it"),
    (FOUR, problem(spec("int4", 8), 8, 64), "cpu", "granularity", "groups of 8 inputs", "from 16 on"),
    (EIGHT, problem(spec("uint8", 4), 8, 64), "cpu", "granularity", "groups of 4 inputs", "from 16 on"),
    (FOUR, problem(spec("int4", 0), 8, 64), "cpu", "granularity", "group size 0", "at least 1"),
    (FOUR, problem(spec("int4", 32), 8, 0), "cpu", "shape", "in_features is 0", "at least 1"),
    (FOUR, problem(spec("int4", 32), (8, 0), 32), "cpu", "shape", "out_features is 0", "at least 1"),
    (
        FOUR,
        problem(spec("int4", 32, scales="float8_e4m3fn"), 8, 32),
        "cpu",
        "dtype",
        "scales in float8_e4m3fn",
        "float16",
    ),
    *(
        (
            kernel,
            problem(spec(str(element), 32), 8, 32),
            "cpu",
            "element",
            f"{element} codes are floating",
            "takes them",
        )
        for kernel in (FOUR, EIGHT)
        for element in ElementType
        if element.floating
    ),
    (
        EIGHT,
        problem(spec("int8", PerBlock(128, 64)), 8, 32),
        "cpu",
        "granularity",
        "blocks of 128 x 64",
        "cpu.dense takes them",
    ),
    (
        FOUR,
        problem(WeightSpec(ElementType.INT4, PerChannel(), global_scale=True), 8, 32),
        "cpu",
        "dtype",
        "a global scale multiplies",
        "cpu.dense takes it",
    ),
    (
        FOUR,
        problem(spec("int4", 32, scales="float8_e8m0fnu"), 8, 32),
        "cpu",
        "dtype",
        "scales in float8_e8m0fnu",
        "float16",
    ),
    (
        FOUR,
        LinearProblem(32, (SegmentSpec(8, spec("int4", 32)), SegmentSpec(8, spec("uint4", 32))), BFLOAT16),
        "cpu",
        "segments",
        "segments differ: int4 group 32 and uint4 group 32",
        "split the call",
    ),
]


@pytest.mark.parametrize(("kernel", "asked", "platform", "code", "reason", "fix"), REFUSED)
def test_a_refusal_says_what_is_wrong_and_what_would_fit(kernel, asked, platform, code, reason, fix) -> None:
    verdict = kernel.supports(asked, Platform.parse(platform))
    assert isinstance(verdict, Rejected)
    assert verdict.code == code
    assert reason in verdict.reason
    assert fix in verdict.fix


def test_casts_are_those_that_are_made() -> None:
    scales, zeros, rounded, partials = (Cast(what, BFLOAT16) for what in ("scales", "zeros", "weights", "partials"))
    for kernel, weight, bias, casts in (
        (FOUR, spec("int4", 32), False, (scales, rounded)),
        (FOUR, spec("uint4", 32), True, (scales, zeros, rounded, partials)),
        (FOUR, spec("uint2", 32, scales=BFLOAT16), False, (zeros, rounded)),
        (EIGHT, spec("int8", 32), False, (scales, rounded)),
        (EIGHT, spec("int8", PerChannel()), True, (scales, partials)),
        (EIGHT, spec("int8", PerTensor(), scales=BFLOAT16), False, (partials,)),
    ):
        assert accepted(kernel, problem(weight, 64, 128, bias=bias)).casts == casts
        for dtype in ("float16", "float32"):
            assert accepted(kernel, problem(weight, 64, 128, dtype, bias=bias)).casts == ()


@pytest.mark.parametrize("dtype", [BFLOAT16, "float16", "float32"])
@pytest.mark.parametrize("bias", [False, True])
def test_both_kernels_are_estimated_far_below_the_last_resort(dtype: str, bias: bool) -> None:
    for n, k in ((192, 576), (576, 576), (49152, 576), (4096, 4096)):
        for kernel, weight in (
            (FOUR, spec("int4", 64)),
            (EIGHT, spec("int8", 64)),
            (EIGHT, spec("int8", PerChannel())),
        ):
            asked = problem(weight, n, k, dtype, bias=bias)
            last = ReferenceKernel().supports(asked, CPU)
            assert isinstance(last, Accepted)
            assert accepted(kernel, asked).cost.at(1) * 3 < last.cost.at(1)


def test_extra_bytes_are_what_the_layout_adds() -> None:
    """Per row and group: two bytes for the offset beside the scale; a zero point has its byte already; one flag."""
    assert accepted(FOUR, problem(spec("int4", 64), 64, 128)).extra_bytes == 64 * 2 * 2 + 1
    assert accepted(FOUR, problem(spec("uint4", 64), 64, 128)).extra_bytes == 64 * 2 * 2 + 1
    assert accepted(FOUR, problem(spec("int4", 64), 64, 128, "float32")).extra_bytes == 1
    act_order = accepted(FOUR, problem(spec("int4", 64, act_order=True), 64, 128))
    assert act_order.extra_bytes == 64 * 2 * 2 + 1 + 4 * 128
    assert "x is permuted once per call" in act_order.notes
    padded = accepted(FOUR, problem(spec("int4", 48), 64, 96))
    assert "empty slots: 96 inputs are laid out as 128" in padded.notes
    assert accepted(EIGHT, problem(spec("int8", PerChannel()), 64, 128)).extra_bytes == 1
    assert accepted(EIGHT, problem(spec("int8", PerChannel()), 64, 130)).notes == (
        "x is filled up from 130 to 144 inputs",
    )


@pytest.mark.parametrize(
    ("sizes", "slots"),
    [
        ({64: 9}, Slots(64, 576)),
        ({128: 32}, Slots(128, 4096)),
        ({512: 8}, Slots(256, 4096)),
        ({576: 1}, Slots(64, 576)),
        ({96: 4}, Slots(32, 384)),
        ({100: 1}, Slots(128, 128)),
        ({48: 2, 4: 1}, Slots(32, 160)),
        ({16: 3}, Slots(32, 96)),
        ({1: 1}, Slots(32, 32)),
    ],
)
def test_groups_are_arranged_with_the_fewest_slots_and_then_the_fewest_scales(sizes, slots) -> None:
    assert arrange(sizes) == slots


def test_group_sizes_count_the_short_last_group() -> None:
    for granularity, k, sizes in (
        (PerChannel(), 576, {576: 1}),
        (PerTensor(), 5, {5: 1}),
        (spec("int4", 64).granularity, 128, {64: 2}),
        (spec("int4", 48).granularity, 100, {48: 2, 4: 1}),
        (spec("int4", 128).granularity, 96, {96: 1}),
    ):
        assert group_sizes(granularity, k) == sizes


def test_probes_pass_here_and_have_nothing_to_say_about_other_machines(monkeypatch) -> None:
    for kernel in (FOUR, EIGHT):
        assert kernel.probe(CPU) is None
    monkeypatch.setattr(torch.ops, "aten", object())
    refusal = int8_module._probe_bytes.__wrapped__()
    assert refusal is not None
    assert "has no operator _weight_int8pack_mm" in refusal.reason
    monkeypatch.setattr(int8_module, "_probe_bytes", lambda: refusal)
    assert EIGHT.probe(CPU) is refusal
    assert EIGHT.probe(Platform.parse("cuda:9.0")) is None


def test_a_wrong_int8_product_is_refused(monkeypatch) -> None:
    class Wrong:
        @staticmethod
        def _weight_int8pack_mm(x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
            return torch.zeros(len(x), len(codes), dtype=x.dtype)

    monkeypatch.setattr(torch.ops, "aten", Wrong)
    refusal = int8_module._probe_bytes.__wrapped__()
    assert refusal is not None
    assert "small int8 product is wrong" in refusal.reason


def test_the_installed_plugin_brings_its_kernels() -> None:
    registry = discover(environ={})
    found = {name: provided.plugin for name, provided in registry.kernels.items() if name.startswith("cpu.")}
    own = ("cpu.int4", "cpu.int8", "cpu.w8a8", "cpu.float4", "cpu.dense")
    assert found == dict.fromkeys((*own, *(f"{name}.dense" for name in own)), "quantplug-cpu")


PLANNING = """
import sys
from quantplug.kernel import LinearKernel
from quantplug.moe import ExpertFunction, MoEProblem
from quantplug.platform import Platform
from quantplug.spec import ElementType, LinearProblem, PerGroup, SegmentSpec, WeightSpec
from quantplug_cpu.plugin import quantplug_kernels
for kernel in quantplug_kernels():
    for element in ElementType:
        spec = WeightSpec(element, PerGroup(64))
        linear = LinearProblem(128, (SegmentSpec(64, spec),), "bfloat16")
        experts = MoEProblem(4, 2, 128, 64, (spec, spec), spec, ExpertFunction(), "bfloat16")
        kernel.supports(linear if isinstance(kernel, LinearKernel) else experts, Platform.parse("cpu"))
print("torch" in sys.modules)
"""


def test_planning_needs_no_torch() -> None:
    done = subprocess.run([sys.executable, "-c", PLANNING], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "False"), done.stderr
