"""Where independent pieces of work are done: by threads of this process, or on other machines."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from uq.formats.checkpoint import Checkpoint
from uq.progress import Progress
from uq.quantize.activations import Activations, Batch, SpilledActivations

Task = TypeVar("Task")
Result = TypeVar("Result")
Piece = TypeVar("Piece")
Work = Callable[[Checkpoint, Task, Progress], Result]
State = Batch


@dataclass(frozen=True)
class Chain(Generic[Piece, Task, Result]):
    """Tasks that need what is passed on from task to task, but not each other's results.

    Functions of a module, or `partial` ones of them: others may have to load them.

    Attributes:
        begin: a piece in front of the first task.
        use: the results of a task, from all pieces in front of it.
        step: pieces behind a task, one after the other. What becomes of one depends on no other.
    """

    begin: Callable[[Checkpoint, Piece], State]
    use: Callable[[Checkpoint, Task, Iterable[State], Progress], Sequence[Result]]
    step: Callable[[Checkpoint, Task, Iterable[State]], Iterator[State]]


class Farm(Protocol):
    """Works on one checkpoint.

    What is farmed out is a function of a module and tasks that can be pickled: it reads the
    checkpoint itself, wherever it runs. The `str` of a task tells the user what is in work.
    """

    def map(
        self, work: Work[Task, Result], tasks: Iterable[Task], *, ahead: int, together: int
    ) -> Iterator[Result]:
        """Results in the order of the tasks. The first tasks begin at once.

        Args:
            ahead: results that wait to be consumed, at most; a farm of several machines has its own
                bound.
            together: tasks that one message to another machine holds.
        """
        ...

    def follow(
        self, chain: Chain[Piece, Task, Result], pieces: Sequence[Piece], tasks: Sequence[Task],
        *, first: int,
    ) -> Iterator[Sequence[Result]]:  # fmt: skip
        """Results of the tasks from number `first` on, in their order."""
        ...


class Threads:
    """The threads of this process; a chain is one thread's work."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        pool: ThreadPoolExecutor,
        threads: int,
        progress: Progress,
        spill: Path | None = None,
    ) -> None:
        """
        Args:
            threads: of the pool.
            spill: folder whose disk keeps what is passed on; None for memory.
        """
        self._checkpoint = checkpoint
        self._pool = pool
        self._threads = threads
        self._progress = progress
        self._spill = spill

    def map(
        self, work: Work[Task, Result], tasks: Iterable[Task], *, ahead: int, together: int
    ) -> Iterator[Result]:
        def perform(task: Task) -> Result:
            return work(self._checkpoint, task, self._progress)

        return map_ahead(self._pool, perform, tasks, ahead + self._threads)

    def follow(
        self, chain: Chain[Piece, Task, Result], pieces: Sequence[Piece], tasks: Sequence[Task],
        *, first: int,
    ) -> Iterator[Sequence[Result]]:  # fmt: skip
        waiting = self._waiting(chain.begin(self._checkpoint, piece) for piece in pieces)
        for number, task in enumerate(tasks):
            if number >= first:
                yield chain.use(self._checkpoint, task, waiting, self._progress)
            passed = chain.step(self._checkpoint, task, waiting)
            for index, state in enumerate(passed):
                waiting[index] = state

    def _waiting(self, states: Iterable[State]) -> Activations:
        """The first state is the largest."""
        found: Activations | None = None
        for state in states:
            if found is None:
                folder = self._spill
                size = sum(array.nbytes for array in state.spilled().values())
                found = [] if folder is None else SpilledActivations(folder, size)
            found.append(state)
        assert found is not None, "no piece"
        return found


def map_ahead(
    pool: ThreadPoolExecutor,
    work: Callable[[Task], Result],
    tasks: Iterable[Task],
    depth: int,
    wait: Callable[[Future[Result]], Result] = Future.result,
) -> Iterator[Result]:
    """`map` over threads, in order, that never runs more than `depth` results ahead.

    The first tasks begin at once, before a result is asked for.
    """
    left = iter(tasks)
    waiting = deque(pool.submit(work, task) for task in islice(left, depth))

    def results() -> Iterator[Result]:
        while waiting:
            result = wait(waiting.popleft())
            waiting.extend(pool.submit(work, task) for task in islice(left, 1))
            yield result

    return results()
