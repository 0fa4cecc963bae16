"""
Tasks in several processes, any of which may break: it takes the task it had with it, and no other.
"""

from __future__ import annotations

import multiprocessing
import time
from dataclasses import dataclass
from itertools import islice
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from multiprocessing.context import SpawnProcess

T = TypeVar("T")
R = TypeVar("R")


@dataclass(slots=True)
class _Worker:
    """A process, the door to it, and the number of the task that it has."""

    process: SpawnProcess
    door: Connection
    task: int


def in_processes(
    function: Callable[[T], R],
    usable: Callable[[], bool],
    tasks: Sequence[T],
    *,
    workers: int,
    seconds: float,
) -> list[R | str]:
    """
    Return what a function returns for each task, or a text that says why there is nothing.

    Args:
        function: runs in a process that has done other tasks before.
        usable: whether that process can go on; asked after each task.
        tasks: begun in this order.
        workers: processes at a time.
        seconds: after which what is not done is given up.
    """
    results: list[R | str] = [f"not begun within {seconds:.0f} s"] * len(tasks)
    left = iter(range(len(tasks)))
    end = time.monotonic() + seconds
    busy = [_start(function, usable, tasks, number) for number in islice(left, workers)]
    retired: list[SpawnProcess] = []
    while busy and (rest := end - time.monotonic()) > 0:
        ready = wait([worker.door for worker in busy], rest)
        for worker in [each for each in busy if each.door in ready]:
            busy.remove(worker)
            try:
                results[worker.task], goes_on = worker.door.recv()
            except (EOFError, OSError):
                worker.process.join()
                results[worker.task], goes_on = f"its process ended with {worker.process.exitcode}", False
            number = next(left, None)
            if number is not None and goes_on:
                worker.task = number
                worker.door.send(tasks[number])
                busy.append(worker)
                continue
            worker.door.close()
            retired.append(worker.process)
            if number is not None:
                busy.append(_start(function, usable, tasks, number))
    for worker in busy:
        worker.process.kill()
        retired.append(worker.process)
        results[worker.task] = f"not done within {seconds:.0f} s"
    for process in retired:
        process.join()
    return results


def _start(function: Callable[[T], R], usable: Callable[[], bool], tasks: Sequence[T], number: int) -> _Worker:
    spawning = multiprocessing.get_context("spawn")
    ours, theirs = spawning.Pipe()
    process = spawning.Process(target=_serve, args=(theirs, function, usable), daemon=True)
    process.start()
    theirs.close()
    ours.send(tasks[number])
    return _Worker(process, ours, number)


def _serve(door: Connection, function: Callable[[T], R], usable: Callable[[], bool]) -> None:
    """Do tasks until there are none, or the process can not go on."""
    goes_on = True
    while goes_on:
        try:
            task = door.recv()
        except EOFError:
            return
        result = function(task)
        goes_on = usable()
        door.send((result, goes_on))
