"""Both phases of benchmarks/gpu with contenders that run on the CPU."""

from __future__ import annotations

from statistics import median
from types import SimpleNamespace

import pytest
import torch
from benchmarks.gpu import checking, hostcost, measuring
from benchmarks.gpu.cases import Case, LinearCase
from benchmarks.gpu.ceilings import Ceilings
from benchmarks.gpu.checking import Checked
from benchmarks.gpu.contenders import Contender, Held
from benchmarks.gpu.experts import LAYERS, ExpertCase, Sizes

CPU = torch.device("cpu")
LIMITS = Ceilings(1e12, 1e14, 2e14)


class Reference(Contender):
    """Multiplies with what the weight stands for, `times` as much for many rows."""

    name = "toy"

    def __init__(self, times: float = 1.0, error: str = "") -> None:
        self.times, self.error = times, error

    def refuses(self, case: Case) -> str:
        return ""

    def prepare(self, case: LinearCase) -> Held:
        return Held({"values": case.weight(CPU).dequantize(torch.float32)}, {})

    def call(self, given: torch.Tensor, held: Held, case: LinearCase) -> torch.Tensor:
        if self.error:
            raise RuntimeError(self.error)
        times = self.times if given.shape[0] > 1 else 1.0
        return (times * given.to(torch.float32) @ held.tensors["values"].t()).to(torch.bfloat16)


class Experts(Contender):
    """Runs experts as they are defined, `off` by a factor."""

    name = "toy experts"
    kind = "experts"
    off = 1.0

    def refuses(self, case: Case) -> str:
        return ""

    def prepare(self, case: ExpertCase) -> Held:
        return Held({"one": torch.ones(1)}, {})

    def call(self, given: object, held: Held, case: ExpertCase) -> torch.Tensor:
        return self.off * case.right(given, quantized=False)[1]


def sampler(call, turns, device):
    """Call once, as capturing does, and sample the number of rows."""
    rows = float(call(turns[0]).shape[0])
    return lambda: rows


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for module in (checking, measuring):
        monkeypatch.setattr(module, "CUDA", CPU)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(measuring, "sampler", sampler)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    return monkeypatch


def play(on_cpu: pytest.MonkeyPatch, contender: Contender) -> None:
    for module in (checking, measuring):
        on_cpu.setattr(module, "make", lambda name, kind: contender)


def both(case: Case, rows: tuple[int, ...]) -> tuple[Checked, dict[int, dict[str, float]]]:
    checked = checking._check(("toy", case, rows))
    points = list(measuring.measure([checked], [case], {"linear": rows, "experts": rows}, LIMITS))
    return checked, {point.rows: point.us for point in points}


def test_who_is_right_is_measured(on_cpu):
    play(on_cpu, Reference())
    checked, us = both(LinearCase("int4 g128", 128, 256), (1, 80))
    assert checked.refused == ""
    assert us == {1: {"toy": 1.0}, 80: {"toy": 80.0}}


def test_who_is_wrong_is_measured_where_it_is_right_only(on_cpu, capsys):
    play(on_cpu, Reference(times=1.02))
    checked, us = both(LinearCase("int4 g128", 128, 256), (1, 16, 80))
    assert checked.refused == "wrong for 16 rows: relative error 0.02"
    assert us == {1: {"toy": 1.0}, 16: {}, 80: {}}


def test_who_breaks_is_left_out_with_the_reason(on_cpu, capsys):
    play(on_cpu, Reference(error="no such kernel\nat all"))
    checked, us = both(LinearCase("int4 g128", 128, 256), (1,))
    assert checked.refused == "RuntimeError: no such kernel"
    assert us == {1: {}}
    assert "Traceback" in capsys.readouterr().err


def test_what_breaks_while_it_is_measured_is_said(on_cpu, capsys):
    contender = Reference()
    play(on_cpu, contender)
    case = LinearCase("int4 g128", 128, 256)
    checked = checking._check(("toy", case, (1,)))
    contender.error = "cannot be captured"
    [point] = measuring.measure([checked], [case], {"linear": (1,)}, LIMITS)
    assert point.us == {}
    assert measuring.broken_at(point) == ["toy: RuntimeError: cannot be captured (int4 g128, 128 x 256, M = 1)"]
    assert f"not measured: {measuring.broken_at(point)[0]}" in capsys.readouterr().out


@pytest.mark.parametrize("where", ["sampler", "series_us"])
def test_who_breaks_in_its_turn_is_left_out_there_and_takes_nobody_along(on_cpu, where, capsys):
    """After some samples, and only for 80 rows: the others' figures and its own elsewhere stay."""
    taken = []

    class Named(Reference):
        def __init__(self, name):
            super().__init__()
            self.name = name

        def call(self, given, held, case):
            y = super().call(given, held, case)
            y.asked = self.name
            return y

    def sample(y):
        taken.append(y.asked)
        if (y.asked, len(y)) == ("weak", 80) and taken.count("weak") % 2 == 0:
            raise RuntimeError("an illegal memory access\nwas encountered")
        return float(len(y))

    def sampled(call, turns, device):
        y = call(turns[0])
        return lambda: sample(y)

    on_cpu.setattr(measuring, "make", lambda name, kind: Named(name))
    on_cpu.setattr(hostcost, "HOST_SHAPE", (128, 256))
    on_cpu.setattr(hostcost, "HOST_ROWS", (1, 80))
    on_cpu.setattr(measuring, where, sampled if where == "sampler" else lambda call: sample(call()))
    if where == "sampler":
        on_cpu.setattr(measuring, "series_us", lambda call: 3.0)
    case = LinearCase("int4 g128", 128, 256)
    checked = [Checked(name, case, errors={1: 0.0, 80: 0.0}) for name in ("weak", "strong")]
    few, many = measuring.measure(checked, [case], {"linear": (1, 80)}, LIMITS)
    assert few.us == {"weak": 1.0, "strong": 1.0}
    assert few.refused == {}
    assert many.us["strong"] == 80.0
    assert list(few.host_us) == ["weak", "strong"]
    assert list(many.host_us) == ["strong"]
    assert ("weak" in many.us) == (where == "series_us")
    assert many.refused == {"weak": "RuntimeError: an illegal memory access"}
    assert many.to_json()["refused"] == many.refused
    assert not any(us != us for point in (few, many) for us in (*point.us.values(), *point.host_us.values()))


def test_contenders_of_a_point_take_turns_and_each_work_is_measured_once(on_cpu):
    taken = []

    class Named(Reference):
        def __init__(self, name):
            super().__init__()
            self.name = name

        def call(self, given, held, case):
            y = super().call(given, held, case)
            return torch.cat([y, y]) if self.name == "twice" else y

    def watched(call, turns, device):
        rows = float(call(turns[0]).shape[0])
        return lambda: taken.append(rows) or rows + len(taken) / 1000

    on_cpu.setattr(measuring, "sampler", watched)
    on_cpu.setattr(measuring, "make", lambda name, kind: Named(name))
    cases = [LinearCase(kind, 128, 256) for kind in ("fp8 weight-only", "fp8 channel w8a8")]
    checked = [Checked(name, case, errors={8: 0.0}) for case in cases for name in ("once", "twice")]
    first, second = measuring.measure(checked, cases, {"linear": (8,)}, LIMITS)
    assert len(taken) >= 2 * 6
    assert all(sorted(taken[n : n + 2]) == [8.0, 16.0] for n in range(0, len(taken), 2))
    assert set(taken[::2]) == {8.0, 16.0}, "the same one first in every round"
    assert {name: len(us) for name, us in first.rounds.items()} == dict.fromkeys(("once", "twice"), len(taken) // 2 - 1)
    assert first.us == {name: pytest.approx(median(us)) for name, us in first.rounds.items()}
    assert second.rounds == first.rounds


def test_a_call_is_enqueued_as_a_layer_makes_it_for_one_layer_and_few_rows(on_cpu):
    on_cpu.setattr(hostcost, "HOST_SHAPE", (128, 256))
    on_cpu.setattr(hostcost, "_CALLS", 3)
    play(on_cpu, Reference())
    case, rows = LinearCase("int4 g128", 128, 256), {"linear": (1, 2, 16)}
    checked = checking._check(("toy", case, rows["linear"]))
    host = {point.rows: list(point.host_us) for point in measuring.measure([checked], [case], rows, LIMITS)}
    assert host == {1: ["toy"], 2: [], 16: ["toy"]}


def test_the_time_of_a_series_of_calls_is_shared_out(on_cpu):
    """By a clock that the calls themselves put forward, by 3 us each."""
    clock = SimpleNamespace(now=5.0)
    on_cpu.setattr(hostcost, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    assert hostcost.series_us(lambda: setattr(clock, "now", clock.now + 3e-6)) == pytest.approx(3.0)


def test_a_point_knows_its_roof(on_cpu):
    play(on_cpu, Reference())
    case = LinearCase("int4 g128", 128, 256)
    checked = checking._check(("toy", case, (1, 16)))
    points = list(measuring.measure([checked], [case], {"linear": (1, 16)}, LIMITS))
    assert points[0].roof_us == pytest.approx(case.read_bytes(1) / 1e6)


@pytest.mark.parametrize(("off", "refused"), [(1.0, ""), (1.02, "wrong for 3 rows: relative error 0.02")])
def test_experts_are_held_against_their_definition(on_cpu, off, refused):
    on_cpu.setitem(LAYERS, "small", Sizes(experts=4, top_k=2, hidden=128, intermediate=128))
    contender = Experts()
    contender.off = off
    play(on_cpu, contender)
    checked, us = both(ExpertCase("int4 g128", "small"), (3,))
    assert checked.refused == refused
    assert us == {3: {} if refused else {"toy experts": 3.0}}


def test_what_a_process_did_not_bring_back_is_refused(on_cpu):
    play(on_cpu, Reference())
    cases = [LinearCase("int4 g128", 128, 256), LinearCase("int4 g128", 256, 256)]
    on_cpu.setattr(checking, "in_processes", lambda check, usable, tasks, **_: [check(tasks[0]), "its process ended"])
    checked = checking.check_all([("toy", case, (1,)) for case in cases], 1.0)
    assert [(result.case, result.refused) for result in checked] == [(cases[0], ""), (cases[1], "its process ended")]


def test_the_same_work_is_done_once(on_cpu):
    contender = Reference()
    play(on_cpu, contender)
    cases = [LinearCase("fp8 weight-only", 128, 256), LinearCase("fp8 channel w8a8", 128, 256)]
    asked = []
    on_cpu.setattr(
        checking,
        "in_processes",
        lambda check, usable, tasks, **_: asked.extend(tasks) or [check(task) for task in tasks],
    )
    checked = checking.check_all([("toy", case, (1,)) for case in cases], 1.0)
    assert [case.format for _, case, _ in asked] == ["fp8 weight-only"]
    assert [result.case for result in checked] == cases
    on_cpu.setattr(contender, "prepare", lambda case: asked.append(case) or Reference.prepare(contender, case))
    points = list(measuring.measure(checked, cases, {"linear": (1,)}, LIMITS))
    assert [point.us for point in points] == [{"toy": 1.0}] * 2
    assert asked[1:] == cases[:1]
    on_cpu.setattr(contender, "quantizes_x", lambda case: case.of_format.quantizes_x)
    assert len({contender.work(case) for case in cases}) == 2


def test_reasons_are_given_once():
    some, other = LinearCase("int4 g128", 128, 256), LinearCase("int4 g128", 256, 256)
    checked = [
        Checked("a", some, "not installed"), Checked("a", other, "not installed"),
        Checked("b", some, "no such kernel"), Checked("b", other), Checked("c", some),
    ]  # fmt: skip
    assert checking.refusals_of(checked) == ["a: not installed", "b: no such kernel (int4 g128, 128 x 256)"]
