"""Layers that benchmarks/gpu measures, and who is asked to run them: what can be said of it without a GPU."""

from __future__ import annotations

import pytest
import torch
from benchmarks.gpu.cases import ROWS, LinearCase, linear_cases
from benchmarks.gpu.ceilings import Ceilings
from benchmarks.gpu.checking import make, tasks_of
from benchmarks.gpu.experts import LAYERS, ExpertCase, Sizes, expert_cases
from benchmarks.gpu.formats import EXPERT_FORMATS, FORMATS, made_weight
from benchmarks.gpu.peers import PEERS

CPU = torch.device("cpu")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(LAYERS, "small", Sizes(experts=6, top_k=2, hidden=256, intermediate=128))
    return "small"


@pytest.mark.parametrize("kind", FORMATS)
def test_what_must_be_read_is_what_a_file_stores(kind):
    case = LinearCase(kind, 256, 384)
    weight = case.weight(CPU)
    codes = weight.codes.nbytes // (2 if kind == "int4 g128" else 1)
    assert case.read_bytes(1) == codes + weight.scales.nbytes
    assert case.problem.segments[0].weight == weight.spec


@pytest.mark.parametrize("kind", FORMATS)
def test_quantizing_x_moves_it_by_at_most_a_step(kind):
    x = torch.randn(5, 256, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    moved = (FORMATS[kind].as_permitted(x) - x.to(torch.float32)).abs()
    assert (moved == 0).all() != FORMATS[kind].quantizes_x
    assert (moved <= x.to(torch.float32).abs() / 16 + 1e-3).all()


def test_a_linear_layer_is_compared_at_both_ends():
    case = LinearCase("int4 g128", 64, 128)
    given = case.inputs(100, CPU)[0]
    some, y = case.right(given, quantized=False)
    assert some.tolist() == [*range(32), *range(68, 100)]
    assert torch.equal(y, given[some].to(torch.float32) @ case.weight(CPU).dequantize(torch.float32).t())


@pytest.mark.parametrize("kind", EXPERT_FORMATS)
def test_experts_are_right_by_the_definition(small, kind):
    case = ExpertCase(kind, small)
    given = case.inputs(3, CPU)[0]
    some, y = case.right(given, quantized=False)
    row = 1
    expected = torch.zeros(256)
    for weight, number in zip(given.weights[row], given.ids[row].tolist(), strict=True):
        expert = case.expert(number, CPU)
        gate, up, down = (part.dequantize(torch.float32) for part in (*expert.w13, expert.w2))
        x = given.x[row].to(torch.float32)
        expected += weight * (down @ (torch.nn.functional.silu(gate @ x) * (up @ x)))
    assert some.tolist() == [0, 1, 2]
    torch.testing.assert_close(y[row], expected)


def test_quantizing_what_enters_both_products_is_a_small_change(small):
    case = ExpertCase("fp8 channel w8a8", small)
    given = case.inputs(16, CPU)[0]
    exact, moved = (case.right(given, quantized=quantized)[1] for quantized in (False, True))
    assert 0.01 < float((moved - exact).norm() / exact.norm()) < 0.1


def test_choices_are_distinct_and_so_are_routings(small):
    case = ExpertCase("int4 g128", small)
    given = case.inputs(16, CPU)
    assert len(given) == 16
    assert all(routed.ids.sort(1).values.diff(dim=1).ne(0).all() for routed in given)
    assert not torch.equal(given[0].ids, given[1].ids)
    torch.testing.assert_close(given[0].weights.sum(1), torch.ones(16))


def test_only_experts_that_are_chosen_are_read(small):
    case = ExpertCase("fp8 weight-only", small)
    one = 3 * 256 * 128 + 4 * (128 + 128 + 256)
    assert case.read_bytes(1) == 2 * one
    assert case.read_bytes(4096) == 6 * one
    assert case.operations(10) == 2 * 10 * 2 * 3 * 256 * 128


def test_the_roof_is_the_larger_of_reading_and_multiplying():
    limits = Ceilings(read=1e12, bf16=1e14, fp8=2e14)
    case = LinearCase("fp8 weight-only", 1024, 1024)
    assert limits.roof_us(case, 1) == pytest.approx(case.read_bytes(1) / 1e12 * 1e6)
    assert limits.roof_us(case, 10_000) == pytest.approx(case.operations(10_000) / 1e14 * 1e6)
    assert limits.roof_us(LinearCase("fp8 channel w8a8", 1024, 1024), 10_000) == pytest.approx(104.8576)


def test_weights_are_the_same_every_time_and_finite():
    for kind, form in FORMATS.items():
        weight = made_weight(form.weight, 128, 256, 3, CPU)
        values = weight.dequantize(torch.float32)
        assert torch.equal(values, made_weight(form.weight, 128, 256, 3, CPU).dequantize(torch.float32)), kind
        assert values.isfinite().all()
        assert values.abs().max() < 0.2


def test_what_is_slow_to_compile_is_checked_first_and_no_one_for_what_is_not_its_business():
    rows = {"linear": ROWS, "experts": (1, 16)}
    cases = linear_cases(list(FORMATS), quick=True) + expert_cases(list(FORMATS), quick=False)
    peers = [maker() for maker in PEERS]
    tasks = tasks_of(peers, cases, rows)
    slow = [make(name, case.kind).slow_to_compile for name, case, _ in tasks]
    assert slow == sorted(slow, reverse=True)
    asked = {(name, case.format): asked for name, case, asked in tasks}
    assert ("DeepGEMM", "fp8 channel w8a8") not in asked
    assert asked["DeepGEMM", "fp8 block w8a8"] == ROWS
    assert asked["torch int4", "int4 g128"] == (1, 4, 16, 32, 64)
    assert {case.format for name, case, _ in tasks if name == "bf16 grouped"} == set(EXPERT_FORMATS)


def test_every_contender_has_a_name_of_its_own():
    everyone = [(peer.kind, peer.name) for peer in (maker() for maker in PEERS)]
    assert len(set(everyone)) == len(everyone)
    assert {peer().role for peer in PEERS} == {"peer", "reference", "informative"}


def test_our_kernels_are_measured_where_somebody_could_choose_them():
    case = LinearCase("int4 g128", 4096, 4096)
    assert make("marlin.wna16", "linear").rows(ROWS, case) == ROWS
    assert make("marlin.wna16.dense", "linear").rows(ROWS, case) == (512, 2048, 8192)
    assert make("triton.wna16", "linear").rows(ROWS, case) == (1, 4, 16, 32, 64, 128)
    assert make("triton.wna16.dense", "linear").rows(ROWS, case) == ()
