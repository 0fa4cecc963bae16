"""
Threads that decode and prepare layers while the next ones are read; the reading one helps when it would have to wait.
"""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Barrier
from typing import TYPE_CHECKING, Generic, Self, TypeVar

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import TracebackType

T = TypeVar("T")

AHEAD_BYTES = 256_000_000
"""What tasks may hold together; one that holds more runs alone."""

_MOST_WORKERS = 4


def worker_count() -> int:
    """
    Return how many threads, all computing on the CPU, are worth having beside the one that reads.

    Reading is work, too: with as many as torch has threads there would be one more than processors, and all would wait.
    """
    return max(1, min(_MOST_WORKERS, torch.get_num_threads() - 1))


class Workers(Generic[T]):
    """
    Runs tasks at once and yields their results in the order in which they were given.

    Each thread computes with its share of torch's threads. Waiting for each other at the end of every small operation
    is what threads of one operation spend their time with when other processes are busy; whole layers rarely wait.
    The caller is one of them: where it would have to wait for room, it runs a task that no thread has begun.

    A context manager; leaving it waits for running tasks and drops those that have not begun.

    Args:
        count: threads beside the caller's.
        help_out: whether the caller runs tasks, too.
    """

    def __init__(self, count: int, *, help_out: bool = True) -> None:
        self._count = count
        self._help_out = help_out
        self._share = 1
        self._tasks: deque[_Task[T]] = deque()
        self._held = 0
        self._pool = ThreadPoolExecutor(count, "quantplug-load")

    def __enter__(self) -> Self:
        threads = torch.get_num_threads()
        self._share = max(1, threads // (self._count + self._help_out))
        together = Barrier(self._count, timeout=60)

        def begin() -> None:
            # The first question makes torch initialise this thread, which would undo the setting later.
            torch.get_num_threads()
            torch.set_num_threads(self._share)
            together.wait()

        for started in [self._pool.submit(begin) for _ in range(self._count)]:
            started.result()
        # Threads that others start inherit what was set last.
        torch.set_num_threads(threads)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def make_room(self, nbytes: int) -> Iterator[T]:
        """
        Yield the results of finished tasks, waiting until a task that holds so many bytes may be given.

        Raises:
            BaseException: what a task raised, in its turn.
        """
        while self._tasks and (
            self._tasks[0].future.done() or len(self._tasks) > 2 * self._count or self._held + nbytes > AHEAD_BYTES
        ):
            yield self._next(leave=self._count)

    def give(self, nbytes: int, work: Callable[[], T]) -> None:
        """Run a task that holds so many bytes until its result is taken."""
        self._held += nbytes
        self._tasks.append(_Task(self._pool.submit(work), work, nbytes))

    def rest(self) -> Iterator[T]:
        """Yield the results of all tasks that are left; raises what a task raised, in its turn."""
        while self._tasks:
            yield self._next(leave=0)

    def _next(self, *, leave: int) -> T:
        first = self._tasks[0]
        while self._help_out and not first.future.done() and self._run_waiting(leave):
            pass
        self._tasks.popleft()
        result = first.future.result() if first.own is None else first.own.result()
        self._held -= first.nbytes
        return result

    def _run_waiting(self, leave: int) -> bool:
        """
        Run the last task that no thread has begun, if there are more than `leave`; return whether there was one.

        The threads go on with what is left. Without that, they would have nothing to do while the caller reads again.
        """
        waiting = [task for task in self._tasks if not (task.future.running() or task.future.done())]
        if len(waiting) <= leave or not waiting[-1].future.cancel():
            return False
        task = waiting[-1]
        task.own = Future()
        with _threads(self._share):
            try:
                task.own.set_result(task.work())
            except BaseException as error:  # noqa: BLE001  # raised in its turn, as if a thread had run it
                task.own.set_exception(error)
        return True


@dataclass(slots=True)
class _Task(Generic[T]):
    """
    One task.

    Attributes:
        future: of the pool.
        work: what is to be done.
        nbytes: what it holds.
        own: the outcome, where the caller ran it.
    """

    future: Future[T]
    work: Callable[[], T]
    nbytes: int
    own: Future[T] | None = None


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Let torch use so many threads for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
