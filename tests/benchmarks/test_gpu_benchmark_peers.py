"""What benchmarks/gpu does around the products of other packages, through Triton's interpreter."""

from __future__ import annotations

import os

import pytest
import torch

pytest.importorskip("triton", reason="triton is installed on Linux only")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs Triton's interpreter: TRITON_INTERPRET=1 before Triton is imported", allow_module_level=True)

from benchmarks.gpu.checking import LARGEST_ERROR
from benchmarks.gpu.experts import LAYERS, ExpertCase, Sizes
from benchmarks.gpu.peers import grouped
from benchmarks.gpu.peers.launch import aligned, between, combined, gathered


def routed(rows: int, top_k: int, experts: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows)
    return torch.rand(rows, experts, generator=generator).topk(top_k, 1).indices.to(torch.int32)


@pytest.mark.parametrize(
    ("rows", "top_k", "experts", "block"),
    [(1, 8, 128, 8), (130, 8, 128, 24), (300, 8, 128, 1), (5, 2, 8, 1), (700, 2, 8, 80)],
)
def test_every_choice_has_one_place_in_a_block_of_its_expert(rows, top_k, experts, block):
    ids = routed(rows, top_k, experts)
    choices, flat = rows * top_k, ids.flatten()
    order = aligned(ids, experts, block)
    filled = -(-torch.bincount(flat, minlength=experts) // block) * block
    assert torch.equal(order.ends.to(torch.int64), filled.cumsum(0))
    assert int(order.total) == int(filled.sum())
    placed = order.choices[: int(order.total)].to(torch.int64)
    real = placed < choices
    assert placed[real].sort().values.tolist() == list(range(choices))
    assert (placed[~real] == choices).all()
    owners = order.owners[: placed.shape[0] // block].repeat_interleave(block)
    assert torch.equal(flat[placed[real]], owners[real])
    assert torch.equal(order.choices[order.places.to(torch.int64)].to(torch.int64), torch.arange(choices))


def test_rows_are_gathered_and_summed_up_by_their_weights():
    ids, x = routed(40, 4, 16), torch.randn(40, 96, generator=torch.Generator().manual_seed(1))
    order = aligned(ids, 16, 1)
    rows, scales = gathered(x, order.choices, 4, quantize=False)
    assert scales is None
    assert torch.equal(rows, x[(order.choices // 4).to(torch.int64)])
    weights = torch.rand(40, 4, generator=torch.Generator().manual_seed(2))
    # The interpreter cuts off where it converts to bfloat16.
    wanted = x * weights.sum(1, keepdim=True)
    assert ((combined(rows, weights, order.places).to(torch.float32) - wanted).abs() <= wanted.abs() / 120 + 1e-5).all()
    per_choice = x.repeat_interleave(4, 0)
    assert torch.equal(combined(per_choice, weights), combined(rows, weights, order.places))


@pytest.mark.parametrize("quantize", [False, True])
def test_the_function_between_is_silu_of_gate_times_up(quantize):
    gate_up = torch.randn(7, 200, generator=torch.Generator().manual_seed(3))
    wanted = torch.nn.functional.silu(gate_up[:, :100]) * gate_up[:, 100:]
    found, scales = between(gate_up, quantize=quantize)
    if not quantize:
        torch.testing.assert_close(found, wanted)
        return
    torch.testing.assert_close(scales, wanted.abs().amax(1) / 448)
    # The interpreter loses the carry where rounding to 8 bits reaches the next power of two; the benchmark's own check
    # on a GPU is the narrow one.
    error = (found.to(torch.float32) * scales[:, None] - wanted).abs()
    assert (error <= wanted.abs() / 2 + scales[:, None] * 2.0**-6).all()


def test_grouped_products_run_a_layer_as_it_is_defined(monkeypatch):
    monkeypatch.setitem(LAYERS, "small", Sizes(experts=8, top_k=2, hidden=256, intermediate=128))
    monkeypatch.setattr(grouped, "CUDA", torch.device("cpu"))
    case, contender = ExpertCase("int4 g128", "small"), grouped.Bfloat16Grouped()
    given = case.inputs(20, torch.device("cpu"))[0]
    some, wanted = case.right(given, quantized=False)
    y = contender.call(given, contender.prepare(case), case)[some].to(torch.float32)
    assert float((y - wanted).norm() / wanted.norm()) < LARGEST_ERROR
