"""The byte order of the packed int4 operator, and the operator's numbers to the bit."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from cpu_layers import Layer, problem, spec

from quantplug.kernel import Rejected
from quantplug_cpu.int4 import Int4Kernel, probe_packed
from quantplug_cpu.int8 import Int8Kernel
from quantplug_cpu.layout import Layout, Packer, detect, known, unpack
from quantplug_testkit.compare import assert_bitwise_equal

CAPABILITY = torch.backends.cpu.get_cpu_capability()
vectorised = pytest.mark.skipif(
    CAPABILITY not in ("AVX512", "AVX2"), reason="the portable build leaves fused operations to the compiler"
)


def packed_by_hand(codes: np.ndarray, layout: Layout) -> np.ndarray:
    """Write the docstring of `layout` out as loops, for codes `[N, K]`."""
    n, k = codes.shape
    half = layout.block // 2
    found = np.zeros((n // layout.block, k, half), np.uint8)
    for block in range(n // layout.block):
        for column in range(k):
            for byte in range(half):
                pair = (byte, byte + half) if layout.split else (2 * byte, 2 * byte + 1)
                low, high = (codes[block * layout.block + row, column] for row in pair)
                found[block, column, byte] = low | high << 4
    return found.reshape(n, k // 2)


@pytest.mark.parametrize("layout", [Layout(b, s) for b in (64, 32, 16) for s in (True, False)])
@pytest.mark.parametrize("n", [64, 192])
def test_packing_in_every_byte_order_is_as_described_and_unpacking_is_its_inverse(layout: Layout, n: int) -> None:
    codes = torch.randint(0, 16, (10, n), dtype=torch.uint8)
    out = torch.empty(n, 5, dtype=torch.uint8)
    packer = Packer(out, layout)
    for begin, end in ((0, 3), (3, 6), (6, 10)):
        packer.write(codes[begin:end], begin)
    assert torch.equal(out, torch.from_numpy(packed_by_hand(codes.t().numpy(), layout)))
    assert torch.equal(unpack(out, 0, n, 1, layout), codes[:, column_rows(n, layout)])


def column_rows(n: int, layout: Layout) -> torch.Tensor:
    """Return the row that each column of an unpacked tile belongs to."""
    blocks, half = n // layout.block, layout.block // 2
    rows = []
    for second in (0, 1):
        for block in range(blocks):
            for lane in range(half):
                within = lane + second * half if layout.split else 2 * lane + second
                rows.append(block * layout.block + within)
    return torch.tensor(rows)


@pytest.mark.parametrize("n", [64, 128, 576])
@pytest.mark.parametrize("k", [32, 96, 288])
def test_packing_is_what_the_operator_makes_itself(n: int, k: int) -> None:
    codes = torch.randint(0, 16, (k, n), dtype=torch.uint8)
    out = torch.empty(n, k // 2, dtype=torch.uint8)
    Packer(out, known()).write(codes, 0)
    wanted = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.t().to(torch.int32), 1)
    assert_bitwise_equal(out, wanted.view_as(out))


def emulate(x: np.ndarray, nibbles: np.ndarray, pairs: np.ndarray, group: int) -> torch.Tensor:
    """
    Compute as the operator does: weights in float32 by one fused multiply-add, sums in float32 from the first input to
    the last, one rounding to bfloat16.

    A float64 holds every product here exactly, so that rounding a sum of it to float32 is a fused multiply-add.
    """
    scale, offset = (np.repeat(pairs[:, :, part].astype(np.float64), group, 0).T for part in (0, 1))
    if CAPABILITY == "AVX512":
        values = ((nibbles - 8.0) * scale + offset).astype(np.float32)
    else:
        start = (-8.0 * scale + offset).astype(np.float32).astype(np.float64)
        values = (nibbles * scale + start).astype(np.float32)
    total = np.zeros((x.shape[0], nibbles.shape[0]), np.float32)
    for k in range(x.shape[1]):
        total = (x[:, k, None].astype(np.float64) * values[None, :, k].astype(np.float64) + total).astype(np.float32)
    return torch.from_numpy(total).to(torch.bfloat16)


@pytest.mark.skipif(
    CAPABILITY not in ("AVX512", "AVX2"), reason="the portable build leaves contraction to the compiler"
)
@pytest.mark.parametrize("rows", [1, 2, 5, 17])
@pytest.mark.parametrize(("n", "k"), [(64, 96), (48, 128), (112, 64)])
@pytest.mark.parametrize("element", ["int4", "uint4"])
def test_four_bit_products_are_the_operators_to_the_bit(element: str, n: int, k: int, rows: int) -> None:
    layer = Layer.of(Int4Kernel(), problem(spec(element, 32), n, k))
    (weight,) = layer.weights
    x = layer.inputs(rows)
    scales = weight.scales.to(torch.bfloat16).to(torch.float32)
    zeros = torch.full_like(scales, 8) if weight.zeros is None else weight.zeros.to(torch.float32)
    offsets = ((8 - zeros) * scales).to(torch.bfloat16).to(torch.float32)
    pairs = torch.stack([scales.t(), offsets.t()], -1).numpy()
    nibbles = weight.codes.to(torch.int32).numpy() + (8 if weight.zeros is None else 0)
    wanted = emulate(x.to(torch.float32).numpy(), nibbles, pairs, 32)
    assert_bitwise_equal(layer.kernel.apply(x, layer.prepared, None), wanted)


@pytest.mark.skipif(
    CAPABILITY not in ("AVX512", "AVX2"), reason="the portable build leaves contraction to the compiler"
)
@pytest.mark.parametrize("rows", [1, 5, 17])
@pytest.mark.parametrize("element", ["int8", "uint8"])
def test_eight_bit_products_are_those_of_two_halves_to_the_bit(element: str, rows: int) -> None:
    layer = Layer.of(Int8Kernel(), problem(spec(element, 64), 80, 128))
    (weight,) = layer.weights
    x = layer.inputs(rows)
    scales = weight.scales.to(torch.bfloat16).to(torch.float32)
    zeros = torch.full_like(scales, 128) if weight.zeros is None else weight.zeros.to(torch.float32)
    offsets = ((128 - zeros) * scales).to(torch.bfloat16).to(torch.float32)
    upper = torch.stack([(16 * scales).t(), offsets.t()], -1)
    lower = torch.stack([scales.t(), (8 * scales).t()], -1)
    codes = weight.codes.to(torch.int32).numpy() + (128 if weight.zeros is None else 0)
    twice = torch.cat([x, x], 1).to(torch.float32).numpy()
    wanted = emulate(twice, np.concatenate([codes >> 4, codes & 15], 1), torch.cat([upper, lower]).numpy(), 64)
    assert_bitwise_equal(layer.kernel.apply(x, layer.prepared, None), wanted)


TRY_ALL = """
import torch
from cpu_layers import CPU, Layer, problem, spec
from quantplug.spec import PerChannel
from quantplug_cpu.int4 import Int4Kernel
from quantplug_cpu.int8 import Int8Kernel
from quantplug_cpu.layout import detect
assert torch.backends.cpu.get_cpu_capability() == {capability!r}, torch.backends.cpu.get_cpu_capability()
four, eight = Int4Kernel(), Int8Kernel()
for kernel, element, group in (
    (four, "uint4", 32), (four, "int3", 48), (eight, "uint8", 32), (eight, "int8", PerChannel())
):
    assert kernel.probe(CPU) is None
    for dtype in ("bfloat16", "float32"):
        layer = Layer.of(kernel, problem(spec(element, group), 72, 100, dtype))
        for rows in (1, 17, 64):
            layer.check(layer.inputs(rows))
print(*detect())
"""


@pytest.mark.parametrize(
    ("capability", "layout"), [("AVX512", Layout(64, True)), ("AVX2", Layout(32, True)), ("DEFAULT", Layout(32, False))]
)
def test_every_build_of_the_operator_is_recognised_and_right(capability: str, layout: Layout) -> None:
    """The same machine, told to use a lesser instruction set, has another byte order."""
    if ("DEFAULT", "AVX2", "AVX512").index(capability) > ("DEFAULT", "AVX2", "AVX512").index(CAPABILITY):
        pytest.skip(f"this machine has no {capability}")
    environ = {**os.environ, "ATEN_CPU_CAPABILITY": capability.lower(), "PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run(
        [sys.executable, "-c", TRY_ALL.format(capability=capability)], env=environ, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout.split()) == (0, [str(part) for part in layout]), done.stderr


def test_a_byte_order_that_is_not_known_is_refused_before_anything_is_prepared(monkeypatch) -> None:
    monkeypatch.setattr("quantplug_cpu.layout.detect", lambda: None)
    refusal = probe_packed.__wrapped__()
    assert isinstance(refusal, Rejected)
    assert "packs int4 weights in an order this version does not know" in refusal.reason
    with pytest.raises(NotImplementedError, match="unknown order"):
        known()


def test_a_wrong_product_and_a_missing_operator_are_refused(monkeypatch) -> None:
    layout = detect()
    assert layout is not None
    monkeypatch.setattr("quantplug_cpu.layout.detect", lambda: Layout(16, not layout.split))
    refusal = probe_packed.__wrapped__()
    assert refusal is not None
    assert "small int4 product is wrong" in refusal.reason
    monkeypatch.setattr(torch.ops, "aten", object())
    refusal = probe_packed.__wrapped__()
    assert refusal is not None
    assert "has no operator _convert_weight_to_int4pack_for_cpu" in refusal.reason
