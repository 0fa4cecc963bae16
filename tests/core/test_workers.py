"""Threads that decode and prepare layers while the next ones are read."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from quantplug.workers import AHEAD_BYTES, Workers, worker_count


def test_results_come_in_the_order_the_tasks_were_given() -> None:
    results: list[int] = []
    with Workers[int](2) as workers:
        for number in range(8):
            results += workers.make_room(1)
            workers.give(1, lambda n=number: (time.sleep(0.01 * (n % 3)), n)[1])
        results += workers.rest()
    assert results == list(range(8))


def test_each_worker_computes_with_its_share_and_everyone_else_as_before() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        seen: list[int] = []
        with Workers[int](1) as workers:
            for _ in range(4):
                workers.give(1, torch.get_num_threads)
            shares = list(workers.rest())
            stranger = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
            stranger.start()
            stranger.join()
            assert (shares, torch.get_num_threads(), seen) == ([1, 1, 1, 1], 2, [2])
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_tasks_that_hold_too_much_wait_for_each_other() -> None:
    running, most = 0, 0
    lock = threading.Lock()

    def task() -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.005)
        with lock:
            running -= 1

    for nbytes, limit in ((AHEAD_BYTES, 1), (AHEAD_BYTES // 2, 2)):
        running = most = 0
        with Workers[None](4) as workers:
            for _ in range(6):
                list(workers.make_room(nbytes))
                workers.give(nbytes, task)
            list(workers.rest())
        assert 1 <= most <= limit


def test_the_first_error_is_raised_in_its_turn_and_tasks_that_have_not_begun_are_dropped() -> None:
    done: list[int] = []
    gate = threading.Event()

    def task(number: int) -> int:
        if number == 1:
            raise ValueError("layer 1")
        if number == 2:
            gate.wait(10)
        done.append(number)
        return number

    results: list[int] = []
    with pytest.raises(ValueError, match="layer 1"), Workers[int](1, help_out=False) as workers:  # noqa: PT012
        for number in range(5):
            workers.give(1, lambda n=number: task(n))
        for result in workers.rest():
            results.append(result)
            threading.Timer(0.1, gate.set).start()
    assert results == [0]
    assert done in ([0], [0, 2])


def test_a_caller_that_would_wait_runs_what_no_thread_has_begun_and_computes_with_its_share() -> None:
    before, gate = torch.get_num_threads(), threading.Event()
    torch.set_num_threads(2)
    try:
        ran: list[tuple[int, bool, int]] = []

        def task(number: int) -> None:
            here = threading.current_thread() is threading.main_thread()
            ran.append((number, here, torch.get_num_threads()))
            assert here or gate.wait(10)
            if here:
                gate.set()

        with Workers[None](1) as workers:
            for number in range(3):
                workers.give(1, lambda n=number: task(n))
                while not ran:
                    time.sleep(0.001)  # until a thread has begun the first
            list(workers.rest())
        assert ran[:2] == [(0, False, 1), (2, True, 1)]
        assert [number for number, *_ in ran[2:]] == [1]
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_what_a_task_raises_in_the_caller_is_raised_in_its_turn_too() -> None:
    gate = threading.Event()

    def fail() -> int:
        gate.set()
        raise ValueError("layer 1")

    results: list[int] = []
    with pytest.raises(ValueError, match="layer 1"), Workers[int](1) as workers:  # noqa: PT012
        workers.give(1, lambda: 0 if gate.wait(10) else 1)
        workers.give(1, fail)
        results.extend(workers.rest())
    assert results == [0]


def test_there_are_no_more_workers_than_threads() -> None:
    assert 1 <= worker_count() <= max(1, torch.get_num_threads() - 1)
