"""Weights dequantized once: values, pieces, mixed layers, memory, and what a plan makes of the cost."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from cpu_layers import CPU, Layer, problem, spec, weights

from quantplug.kernel import Accepted, Cast, LinearKernel, Rejected
from quantplug.spec import ElementType, LinearProblem, PerBlock, PerChannel, PerTensor, SegmentSpec, WeightSpec
from quantplug.weight import Weight
from quantplug_cpu import whole
from quantplug_cpu.dense import DenseKernel
from quantplug_cpu.float4 import Float4Kernel
from quantplug_cpu.int4 import Int4Kernel
from quantplug_cpu.int8 import Int8Kernel
from quantplug_testkit.compare import assert_bitwise_equal
from quantplug_testkit.oracles import floats

DENSE = DenseKernel()
MXFP4 = spec("float4_e2m1fn", 32, scales="float8_e8m0fnu")
MXFP8 = spec("float8_e4m3fn", 32, scales="float8_e8m0fnu")
NVFP4 = spec("float4_e2m1fn", 16, scales="float8_e4m3fn", global_scale=True)
FP8 = spec("float8_e4m3fn", PerChannel(), scales="float32")
BLOCKS = spec("float8_e4m3fn", PerBlock(48, 32), scales="bfloat16")


def accepted(kernel: LinearKernel, asked: LinearProblem) -> Accepted:
    verdict = kernel.supports(asked, CPU)
    assert isinstance(verdict, Accepted), verdict
    return verdict


@pytest.mark.parametrize("element", [str(kind) for kind in ElementType if kind.floating])
def test_every_finite_floating_point_code_has_its_value(element: str) -> None:
    table = floats.values(element)
    octets = np.flatnonzero(np.isfinite(table)).astype(np.uint8)
    codes = torch.from_numpy(octets).view(1, -1)
    if element != "float4_e2m1fn":
        codes = codes.view(getattr(torch, element))
    given = Weight(codes, torch.tensor([[0.25]], dtype=torch.float16), spec(element, PerTensor()))
    for dtype in ("float32", "bfloat16"):
        layer = Layer.of(DENSE, problem(given.spec, 1, octets.size, dtype), (given,))
        found = DENSE.dequantize(layer.prepared, torch.float32)
        assert_bitwise_equal(found.numpy()[0], (table[octets] * 0.25).astype(np.float32))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_segments_of_every_kind_lie_in_one_layer(dtype: str) -> None:
    kinds = (BLOCKS, MXFP8, NVFP4, spec("uint4", 32, act_order=True), spec("int8", PerTensor()), MXFP4)
    sizes = (100, 7, 33, 16, 1, 64)
    segments = tuple(SegmentSpec(size, kind) for size, kind in zip(sizes, kinds, strict=True))
    layer = Layer.of(DENSE, LinearProblem(80, segments, dtype, bias=True))
    bias = torch.randn(sum(sizes)).to(getattr(torch, dtype))
    for rows in (0, 1, 2, 3, 17):
        layer.check(layer.inputs(rows), bias)


@pytest.mark.parametrize(
    "kind",
    [BLOCKS, spec("uint8", PerBlock(3, 50)), FP8, NVFP4, spec("uint4", 32, act_order=True), spec("int8", PerTensor())],
)
def test_weights_are_dequantized_piece_by_piece_to_the_same_bits(kind: WeightSpec, monkeypatch) -> None:
    """Pieces of seven rows cut through blocks of 3 and of 48."""
    monkeypatch.setattr(whole, "_PIECE_WEIGHTS", 7 * 96 + 5)
    asked = problem(kind, 100, 96, "bfloat16")
    (given,) = weights(asked)
    layer = Layer.of(DENSE, asked, (given,))
    assert_bitwise_equal(layer.prepared.tensors["weight"], given.dequantize(torch.bfloat16))


def test_the_copy_is_what_it_says_in_the_plan() -> None:
    asked = problem(MXFP4, 64, 128)
    verdict = accepted(DENSE, asked)
    assert verdict.casts == (Cast("weights", "bfloat16"),)
    assert verdict.extra_bytes == 64 * 128 * 2 - (64 * 128 // 2 + 64 * 4)
    assert verdict.notes == ("weights are held in bfloat16, 3.8 times their bytes in the file",)
    assert accepted(DENSE, replace(asked, dtype="float32")).casts == ()
    assert Layer.of(DENSE, asked).prepared.nbytes == 64 * 128 * 2


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize(("n", "k"), [(192, 576), (576, 576), (49152, 576), (4096, 4096)])
def test_what_a_packed_kernel_takes_is_not_blown_up(dtype: str, n: int, k: int) -> None:
    packed: list[tuple[LinearKernel, WeightSpec]] = [
        (Int4Kernel(), spec(f"{sign}int{bits}", 64)) for sign in ("", "u") for bits in (2, 3, 4)
    ]
    if dtype == "bfloat16":
        packed += [(Int8Kernel(), spec("int8", shared)) for shared in (64, PerChannel())]
        packed += [(Float4Kernel(), MXFP4)]
    for kernel, kind in packed:
        asked = problem(kind, n, k, dtype)
        assert accepted(kernel, asked).cost.at(1) < accepted(DENSE, asked).cost.at(1), (kernel.name, kind)


@pytest.mark.parametrize("kind", [FP8, BLOCKS, MXFP8, NVFP4])
def test_formats_without_an_operator_are_taken_by_this_kernel_only(kind: WeightSpec) -> None:
    asked = problem(kind, 64, 128)
    accepted(DENSE, asked)
    for kernel in (Int4Kernel(), Int8Kernel(), Float4Kernel()):
        refusal = kernel.supports(asked, CPU)
        assert isinstance(refusal, Rejected)
        assert "cpu.dense" in refusal.fix or "cpu.float4" in refusal.fix


@pytest.mark.parametrize(
    ("asked", "code", "reason"),
    [
        (problem(FP8, 8, 32, "float64"), "dtype", "activation dtype float64"),
        (problem(spec("int4", 32, scales="float64"), 8, 32), "dtype", "scales in float64"),
        (problem(FP8, (8, 0), 32), "shape", "out_features is 0"),
        (problem(FP8, 8, 0), "shape", "in_features is 0"),
        (problem(spec("int4", 0), 8, 32), "granularity", "group size 0"),
        (problem(spec("int8", PerBlock(0, 4)), 8, 32), "granularity", "blocks of 0 x 4"),
    ],
)
def test_refusals_name_what_does_not_fit(asked: LinearProblem, code: str, reason: str) -> None:
    refusal = DENSE.supports(asked, CPU)
    assert isinstance(refusal, Rejected)
    assert (refusal.code, reason in refusal.reason) == (code, True), refusal


def test_weights_that_break_their_contract_are_refused_by_name() -> None:
    asked = problem(NVFP4, 32, 64)
    (good,) = weights(asked)
    for bad, message in (
        (replace(good, global_scale=None), "a global scale is missing for float4_e2m1fn group 16"),
        (replace(good, codes=good.codes.view(torch.int8)), "codes are torch.int8, not torch.uint8"),
        (replace(good, scales=good.scales[:, :1]), r"scales are \[32, 1\], not \[32, 4\]"),
    ):
        with pytest.raises(ValueError, match=message):
            Layer.of(DENSE, asked, (bad,))


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_gradients_reach_x_through_the_dense_copy(dtype: str, rows: int) -> None:
    layer = Layer.of(DENSE, problem(MXFP8, 64, 96, dtype))
    x = layer.inputs(rows).requires_grad_()
    DENSE.apply(x, layer.prepared, None).sum().backward()
    assert x.grad is not None
    wanted = layer.prepared.tensors["weight"].to(torch.float64).sum(0)
    limit = 64 * torch.finfo(x.dtype).eps * layer.prepared.tensors["weight"].to(torch.float64).abs().sum(0)
    assert bool(((x.grad.to(torch.float64) - wanted).abs() <= limit).all())


def test_values_that_are_handed_out_are_a_copy() -> None:
    layer = Layer.of(DENSE, problem(FP8, 8, 32))
    DENSE.dequantize(layer.prepared, torch.bfloat16).zero_()
    layer.check(layer.inputs(2))


PEAK = """
from pathlib import Path
import torch
from cpu_layers import problem, spec
from quantplug.spec import PerBlock
from quantplug.weight import Weight
from quantplug_cpu.dense import DenseKernel

def status(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024

n, k = 4096, 8192
weight = spec("float8_e4m3fn", PerBlock(128, 128), scales="float32")
given = Weight(torch.zeros(n, k, dtype=torch.uint8).view(torch.float8_e4m3fn), torch.ones(n // 128, k // 128), weight)
torch.set_num_threads(1)
Path("/proc/self/clear_refs").write_text("5")
before = status("VmRSS")
prepared = DenseKernel().prepare(problem(weight, n, k), (given,), (None,), torch.device("cpu"))
print(status("VmHWM") - before - prepared.nbytes)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux to tell the peak")
def test_preparing_takes_no_float32_copy_of_the_layer() -> None:
    """It would be 134 MB here."""
    path = {"PYTHONPATH": str(Path(__file__).parent), "PATH": ""}
    done = subprocess.run([sys.executable, "-c", PEAK], env=path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 25_000_000
