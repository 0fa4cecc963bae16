"""
Threads that decode and prepare layers while the next ones are read.
"""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
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
    """Return how many tasks of this process, all computing on the CPU, are worth running at once."""
    return min(_MOST_WORKERS, torch.get_num_threads())


class Workers(Generic[T]):
    """
    Runs tasks at once and yields their results in the order in which they were given.

    Each thread computes with its share of torch's threads. Waiting for each other at the end of every small operation
    is what threads of one operation spend their time with when other processes are busy; whole layers rarely wait.

    A context manager; leaving it waits for running tasks and drops those that have not begun.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._tasks: deque[tuple[Future[T], int]] = deque()
        self._held = 0
        self._pool = ThreadPoolExecutor(count, "quantplug-load")

    def __enter__(self) -> Self:
        threads = torch.get_num_threads()
        together = Barrier(self._count, timeout=60)

        def begin() -> None:
            # The first question makes torch initialise this thread, which would undo the setting later.
            torch.get_num_threads()
            torch.set_num_threads(max(1, threads // self._count))
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
            self._tasks[0][0].done() or len(self._tasks) > self._count or self._held + nbytes > AHEAD_BYTES
        ):
            yield self._next()

    def give(self, nbytes: int, task: Callable[[], T]) -> None:
        """Run a task that holds so many bytes until its result is taken."""
        self._held += nbytes
        self._tasks.append((self._pool.submit(task), nbytes))

    def rest(self) -> Iterator[T]:
        """Yield the results of all tasks that are left; raises what a task raised, in its turn."""
        while self._tasks:
            yield self._next()

    def _next(self) -> T:
        future, nbytes = self._tasks.popleft()
        result = future.result()
        self._held -= nbytes
        return result
