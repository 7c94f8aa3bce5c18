"""Where independent pieces of work are done: by threads of this process, or on other machines."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from typing import Protocol, TypeVar

from uq.formats.checkpoint import Checkpoint

Task = TypeVar("Task")
Result = TypeVar("Result")


class Farm(Protocol):
    """Works on pieces of one checkpoint.

    What is farmed out is a function of a module and tasks that can be pickled: it reads the
    checkpoint itself, wherever it runs.
    """

    def map(
        self,
        work: Callable[[Checkpoint, Task], Result],
        tasks: Iterable[Task],
        *,
        ahead: int,
        together: int,
    ) -> Iterator[Result]:
        """Results in the order of the tasks. The first tasks begin at once.

        Args:
            tasks: their `str` tells the user what is in work.
            ahead: results that wait to be consumed, at most; a farm of several machines has its own
                bound.
            together: tasks that one message to another machine holds.
        """
        ...


class Threads:
    """The threads of this process."""

    def __init__(self, checkpoint: Checkpoint, pool: ThreadPoolExecutor, threads: int) -> None:
        """`threads` of the pool."""
        self._checkpoint = checkpoint
        self._pool = pool
        self._threads = threads

    def map(
        self,
        work: Callable[[Checkpoint, Task], Result],
        tasks: Iterable[Task],
        *,
        ahead: int,
        together: int,
    ) -> Iterator[Result]:
        return map_ahead(self._pool, partial(work, self._checkpoint), tasks, ahead + self._threads)


def map_ahead(
    pool: ThreadPoolExecutor, work: Callable[[Task], Result], tasks: Iterable[Task], depth: int
) -> Iterator[Result]:
    """`map` over threads, in order, that never runs more than `depth` results ahead.

    The first tasks begin at once, before a result is asked for.
    """
    left = iter(tasks)
    waiting = deque(pool.submit(work, task) for task in islice(left, depth))

    def results() -> Iterator[Result]:
        while waiting:
            result = waiting.popleft().result()
            waiting.extend(pool.submit(work, task) for task in islice(left, 1))
            yield result

    return results()
