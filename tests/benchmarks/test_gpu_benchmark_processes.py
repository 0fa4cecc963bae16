"""Tasks in processes that may break."""

from __future__ import annotations

import os
import time

from benchmarks.gpu.processes import in_processes

PATIENT = 60.0


def at_work(task: str) -> tuple[str, int]:
    """Do what the task says."""
    if task == "die":
        os._exit(3)
    if task == "sleep":
        time.sleep(PATIENT)
    return task, os.getpid()


def always() -> bool:
    return True


def never() -> bool:
    return False


def test_a_process_does_one_task_after_another():
    found = in_processes(at_work, always, ["a", "b", "c"], workers=1, seconds=PATIENT)
    assert [result[0] for result in found] == ["a", "b", "c"]
    assert len({result[1] for result in found}) == 1


def test_a_process_that_dies_takes_its_own_task_only():
    found = in_processes(at_work, always, ["die", "a"], workers=1, seconds=PATIENT)
    assert found[0] == "its process ended with 3"
    assert found[1][0] == "a"


def test_a_process_that_cannot_go_on_is_replaced():
    found = in_processes(at_work, never, ["a", "b"], workers=1, seconds=PATIENT)
    assert [result[0] for result in found] == ["a", "b"]
    assert len({result[1] for result in found}) == 2


def test_what_takes_too_long_is_given_up():
    started = time.monotonic()
    found = in_processes(at_work, always, ["sleep", "a"], workers=1, seconds=1.5)
    assert found == ["not done within 2 s", "not begun within 2 s"]
    assert time.monotonic() - started < PATIENT / 2


def test_no_tasks_need_no_process():
    assert in_processes(at_work, always, [], workers=2, seconds=1.0) == []
