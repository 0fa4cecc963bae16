"""The clock: what is timed, how often, in which order; and what becomes of graphs, on a GPU that is made up."""

from __future__ import annotations

import time
from contextlib import contextmanager

import pytest
import torch

from quantplug.stopwatch import ceilings, cold_copies, in_turns, per_call, sampler

DEVICE = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_cold_copies_hold_more_than_a_cache():
    small = {"a": torch.zeros(1000, dtype=torch.uint8)}
    copies = cold_copies(small, DEVICE)
    assert len(copies) == 64
    assert copies[0]["a"] is small["a"]
    assert len({turn["a"].data_ptr() for turn in copies}) == 64


def test_a_call_is_timed_on_all_turns_and_longer_calls_take_longer():
    used = set()

    def call(turn):
        used.add(turn)
        torch.ones(100 if turn < 3 else 300_000).sum()

    quick = per_call(call, [0, 1, 2], DEVICE, seconds=0.01)
    assert used == {0, 1, 2}
    assert 0 < quick < per_call(call, [3], DEVICE, seconds=0.01)


def test_calls_that_are_compared_take_turns_in_an_order_that_changes():
    taken = []

    def of(name):
        return lambda: taken.append(name) or float(len(taken))

    found = in_turns([of("a"), of("b"), of("c")], seconds=0.0, fewest=5)
    rounds = ["".join(taken[first : first + 3]) for first in range(0, len(taken), 3)]
    assert len(rounds) == 6
    assert all(sorted(each) == ["a", "b", "c"] for each in rounds)
    assert len(set(rounds)) > 2
    places = {name: [3 * n + each.index(name) + 1.0 for n, each in enumerate(rounds)] for name in "abc"}
    assert found == [places[name][1:] for name in "abc"]


def test_rounds_go_on_for_as_long_as_is_asked_but_not_without_end():
    [quick] = in_turns([lambda: 1.0], seconds=10.0)
    assert len(quick) == 9
    [slow] = in_turns([sampler(lambda turn: time.sleep(0.005), [0], DEVICE)], seconds=0.0)
    assert len(slow) == 3
    assert min(slow) > 5000


def test_ceilings_are_measured():
    found = ceilings(DEVICE, ["float32"], seconds=0.001)
    assert found.read > 1e8
    assert found.flops["float32"] > 1e8


# -- graphs


class MadeUp:
    """A GPU and its host, each with a time of its own in milliseconds; launching a graph takes the host a while."""

    def __init__(self, monkeypatch):
        self.gpu = self.host = 0.0
        self.captured = None
        self.graphs = []
        outer = self

        class Event:
            def __init__(self, enable_timing):
                self.at = 0.0

            def record(self):
                outer.run(0.0)
                self.at = outer.gpu

            def synchronize(self):
                outer.host = max(outer.host, self.at)

            def elapsed_time(self, other):
                return other.at - self.at

        class Graph:
            def __init__(self):
                self.calls = []
                outer.graphs.append(self)

            def replay(self):
                outer.host += 0.1
                for milliseconds in self.calls:
                    outer.run(milliseconds)

        @contextmanager
        def capture(graph):
            self.captured = graph.calls
            yield
            self.captured = None

        for name, stand_in in (("Event", Event), ("CUDAGraph", Graph), ("graph", capture)):
            monkeypatch.setattr(torch.cuda, name, stand_in)
        monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: self.run(cycles / 2e6))

    def run(self, milliseconds):
        if self.captured is not None:
            self.captured.append(milliseconds)
        else:
            self.gpu = max(self.gpu, self.host) + milliseconds

    def call(self, milliseconds):
        """Enqueue what takes so long on the GPU, and 20 us on the host."""
        self.host += 0.02
        self.run(milliseconds)


@pytest.mark.parametrize(
    ("milliseconds", "turns", "captured"), [(0.005, 20, 200), (0.1, 3, 9), (2.5, 3, 3), (5.0, 64, 4), (30.0, 2, 1)]
)
def test_a_graph_of_all_turns_or_of_some_is_timed_without_the_host(monkeypatch, milliseconds, turns, captured):
    machine = MadeUp(monkeypatch)
    assert per_call(machine.call, [milliseconds] * turns, torch.device("cuda"), seconds=0.0) == pytest.approx(
        1e3 * milliseconds
    )
    [graph] = machine.graphs
    assert len(graph.calls) == captured


def test_what_cannot_be_captured_is_timed_as_it_runs(monkeypatch):
    """Host included, which is what it waits for."""
    machine = MadeUp(monkeypatch)
    assert per_call(machine.call, [0.005], torch.device("cuda"), seconds=0.0, graph=False) == pytest.approx(20, rel=0.3)
    assert machine.graphs == []
