"""
What lies around humming's products for experts, element by element: Triton's interpreter and a stand-in for humming.

On a machine with a GPU tests/device does the same, and more, with humming itself.
"""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch

from quantplug.kernel import Accepted
from quantplug.platform import Platform
from quantplug_humming.experts import HummingExperts
from quantplug_testkit.compare import assert_bitwise_equal
from quantplug_testkit.conformance.experts import EXPERT_CATALOGUE
from quantplug_testkit.conformance.experts.case import ExpertCase
from quantplug_testkit.conformance.experts.routing import scatter

pytest.importorskip("triton", reason="triton is installed on Linux only")
from quantplug_humming.routing import Choices, most_blocks, to_blocks  # needs triton

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("Triton compiles for the GPU here: see tests/device", allow_module_level=True)

pytestmark = pytest.mark.usefixtures("stand_in")

KERNEL = HummingExperts()
GPU = Platform.parse("cuda:9.0")
FAMILIES = {
    hazard.family: hazard
    for hazard in EXPERT_CATALOGUE
    if hazard.problem.activation is None and isinstance(KERNEL.supports(hazard.problem, GPU), Accepted)
}
SOME = ("odd-h-and-i-bias", "all-of-three")


def case_of(name: str) -> ExpertCase:
    return ExpertCase(KERNEL, GPU, torch.device("cpu"), FAMILIES[name])


@pytest.mark.parametrize("name", FAMILIES)
def test_every_element_is_within_the_derived_bound(name):
    case = case_of(name)
    x, routing = case.inputs(3), case.route(3)
    case.check(x, routing, case.apply(x, routing), "3 rows")
    assert case.prepared.nbytes <= sum(part.nbytes for part in parts(case)) + case.extra_bytes


def parts(case: ExpertCase) -> list[torch.Tensor]:
    """Return what the experts of a case are, codes at their stored width."""
    found: list[torch.Tensor] = []
    for expert in case.experts():
        for weight in (*expert.w13, expert.w2):
            codes = weight.codes.view(torch.uint8).flatten()
            found.append(codes[: -(-codes.numel() * weight.spec.element.bits // 8)])
            found += [each for each in (weight.scales, weight.zeros) if each is not None]
        found += [*expert.b13, *([] if expert.b2 is None else [expert.b2])]
    return found


@pytest.mark.parametrize("name", SOME)
def test_every_routing_is_within_the_derived_bound(name):
    case = case_of(name)
    for rows, kind in ((26, "one-expert"), (9, "idle-ends"), (9, "repeated"), (3, "nowhere"), (20, "spread")):
        x, routing = case.inputs(rows), case.route(rows, kind)
        case.check(x, routing, case.apply(x, routing), f"{rows} rows, {kind}")


@pytest.mark.parametrize("name", SOME)
def test_a_map_says_which_experts_are_here(name):
    case = case_of(name)
    x = case.inputs(7)
    for dtype in (torch.int64, torch.int32):
        routing = scatter(case.hazard, case.route(7)).with_ids(dtype)
        case.check(x, routing, case.apply(x, routing), f"ids and a map in {dtype}")


def test_no_rows_give_no_rows():
    case = case_of("int4")
    case.apply(case.inputs(0), case.route(0))


def test_padding_hides_what_x_and_weights_hold():
    case = case_of("bias")
    x, routing = case.inputs(6), case.route(6, "spread")
    clean = x.clone()
    clean[::2] = 0
    for holder, value in ((x, torch.nan), (routing.weights, torch.inf), (routing.ids, -1)):
        holder[::2] = value
    y = case.apply(x, routing)
    assert torch.equal(y[::2], torch.zeros_like(y[::2]))
    case.check(clean, routing, y, "y beside padded rows")


@pytest.mark.parametrize(
    ("count", "experts", "rows"), [(1, 1, 8), (70, 40, 8), (1024, 5, 24), (1500, 5, 24), (5000, 3, 96)]
)
def test_choices_are_put_in_order_also_in_several_goes(count, experts, rows):
    ids = torch.randint(-2, experts + 2, (count, 1), generator=torch.Generator().manual_seed(count))
    blocks = to_blocks(Choices(ids, None, experts), rows)
    expected, owners = [], []
    for expert in range(experts):
        mine = (ids[:, 0] == expert).nonzero()[:, 0].tolist()
        own = -(-len(mine) // rows)
        expected += mine + [count] * (own * rows - len(mine))
        owners += [expert] * own
    assert int(blocks.total) == len(expected)
    found = blocks.order[: len(expected)].view(-1, rows)
    for expert in range(experts):
        mine = [place for place, owner in enumerate(owners) if owner == expert]
        held = found[mine].flatten().tolist()
        wanted = [choice for place in mine for choice in expected[place * rows : (place + 1) * rows]]
        assert sorted(held) == sorted(wanted)
        assert held[len(wanted) - wanted.count(count) :] == [count] * wanted.count(count)
    assert blocks.owners[: len(owners)].tolist() == owners
    assert not blocks.locks.any()


def test_strided_and_unaligned_operands_are_read_where_they_lie():
    case = case_of("int8")
    x, routing = case.inputs(6), case.route(6)
    wide = torch.full((6, 2 * x.shape[1]), torch.nan, dtype=x.dtype)
    wide[:, ::2] = x
    expected = case.apply(x, routing)
    assert torch.equal(case.apply(wide[:, ::2], routing), expected)
    turned = replace(routing, weights=routing.weights.t().contiguous().t(), ids=routing.ids.t().contiguous().t())
    assert torch.equal(case.apply(x, turned), expected)
    shifted = torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view_as(x).copy_(x)
    assert shifted.is_contiguous()
    assert torch.equal(case.apply(shifted, routing), expected)


def test_products_may_want_blocks_of_different_sizes(stand_in, monkeypatch):
    chosen = stand_in.tune.get_heuristics_config

    def differing(config, **asked):
        return chosen(config, **asked) | {"block_shape": [8 if config.shape_k > 128 else 16, 128, 64]}

    monkeypatch.setattr(stand_in.tune, "get_heuristics_config", differing)
    case = case_of("tiles-int4-group128")
    x, routing = case.inputs(7), case.route(7)
    case.check(x, routing, case.apply(x, routing), "7 rows")


def test_preparing_again_overwrites_in_place():
    case = case_of("bias")
    kept = case.prepared
    addresses = {name: tensor.data_ptr() for name, tensor in kept.tensors.items()}
    again = case.prepare(seed=1, out=kept)
    assert {name: tensor.data_ptr() for name, tensor in again.tensors.items()} == addresses
    for name, tensor in case.prepare(seed=1).tensors.items():
        assert_bitwise_equal(again.tensors[name], tensor, name)


def test_the_compiler_sees_one_operator():
    case = case_of("odd-h-and-i-bias")
    x, routing, made = case.inputs(3), case.route(3), case.prepared

    def call(x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return KERNEL.apply(x, weights, ids, made)

    torch.compiler.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, routing.weights, routing.ids), case.apply(x, routing))


@pytest.mark.parametrize("rows", [8, 24, 96])
def test_blocks_suffice_however_choices_fall(rows):
    for counts in ([1] * 20, [rows + 1] * 5, [0, 0, 7 * rows], [1, rows, rows + 1, 0], [3]):
        needed = sum(-(-count // rows) for count in counts)
        assert needed <= most_blocks(sum(counts), len(counts), rows)
