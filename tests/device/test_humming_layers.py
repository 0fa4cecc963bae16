"""The humming kernel on a GPU where sums are cut into parts: streams, graphs, odd sizes."""

from __future__ import annotations

import pytest
import torch
from device_checks import on_two_streams

from quantplug.spec import ElementType, LinearProblem, PerGroup, SegmentSpec, WeightSpec
from quantplug.weight import Weight
from quantplug_humming.kernel import HummingKernel

pytest.importorskip("humming", reason="humming-kernels is not installed here", exc_type=ImportError)

KERNEL = HummingKernel()
SPEC = WeightSpec(ElementType.INT4, PerGroup(128), "bfloat16")
NEAR = 2**-7
"""Of the norm: four times what one rounding to bfloat16 is."""


def layer(cuda: torch.device, n: int, k: int):
    """Return a prepared layer and its values."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-8, 8, (n, k), generator=generator).to(torch.int8)
    scales = (torch.rand(n, -(-k // 128), generator=generator) * 0.01 + 0.005).to(torch.bfloat16)
    weight = Weight(codes, scales, SPEC)
    problem = LinearProblem(k, (SegmentSpec(n, SPEC),), "bfloat16")
    return KERNEL.prepare(problem, [weight], [None], cuda), weight.dequantize().to(cuda)


def off(y: torch.Tensor, x: torch.Tensor, values: torch.Tensor) -> float:
    """Return how far y is off, relative to the norm."""
    exact = x.to(torch.float32) @ values.t()
    return float((y.to(torch.float32) - exact).norm() / exact.norm())


def test_sums_in_parts_on_two_streams_at_once_are_right(cuda: torch.device) -> None:
    prepared, values = layer(cuda, 2048, 4096)
    inputs = [torch.randn(16, 4096, dtype=torch.bfloat16, device=cuda) for _ in range(2)]
    for x in inputs:
        assert off(KERNEL.apply(x, prepared, None), x, values) < NEAR
    for x, found in zip(inputs, on_two_streams(KERNEL, prepared, inputs, calls=50), strict=True):
        assert all(off(y, x, values) < NEAR for y in found)


@pytest.mark.parametrize(("n", "k"), [(2048, 4096), (2049, 2047)])
def test_a_graph_is_right_also_for_other_inputs(cuda: torch.device, n: int, k: int) -> None:
    prepared, values = layer(cuda, n, k)
    x = torch.randn(16, k, dtype=torch.bfloat16, device=cuda)
    KERNEL.apply(x, prepared, None)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = KERNEL.apply(x, prepared, None)
    for _ in range(3):
        x.copy_(torch.randn_like(x))
        graph.replay()
        assert off(y, x, values) < NEAR
