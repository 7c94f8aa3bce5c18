"""A `Chain` as a graph of Dask's: what is passed on stays on the workers.

So do results until they are fetched. Each arrow is a task of its own, which any worker may do; it
gets the states that it lacks from other workers.

    piece 0 -> state -> state -> ...
    piece 1 -> state -> state -> ...
                  |        |
                 use      use

What is lost with a worker is made again by Dask from what it was made of, if need be from the
pieces.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from operator import getitem
from typing import Any, Generic

from distributed import Future

from uq.cluster.link import Link
from uq.cluster.members import Members
from uq.cluster.worker import Job, begin, step, use
from uq.quantize.farm import Chain, Piece, Result, Task


class RelayLost(Exception):
    """No worker is left that was there all the time."""


class Relay(Generic[Piece, Task, Result]):
    """One way through a chain."""

    def __init__(
        self,
        link: Link,
        members: Members,
        job: Job,
        chain: Chain[Piece, Task, Result],
        pieces: Sequence[Piece],
        tasks: Sequence[Task],
    ) -> None:
        """Sends the pieces."""
        self._link, self._members, self._job, self._chain = link, members, job, chain
        self._tasks = tasks
        self._kept = self._workers = members.admitted()
        self._passed = 0  # tasks that the states are behind
        self._waiting: deque[Future[Sequence[Result]]] = deque()
        self._states = [self._send(begin, chain, piece, label="text") for piece in pieces]

    def results(
        self, first: int, ahead: int, meanwhile: Callable[[], None]
    ) -> Iterator[Sequence[Result]]:
        """Of the tasks from number `first` on; at most `ahead` of them are with the workers.

        Raises:
            RelayLost: see there.
        """
        for number in range(first, len(self._tasks)):
            while self._passed < min(number + ahead, len(self._tasks)):
                self._advance(used=self._passed >= first)
            done = self._waiting.popleft()
            yield self._fetched(done, meanwhile)
            done.release()

    def close(self) -> None:
        """Drop what is in work."""
        for future in (*self._states, *self._waiting):
            future.release()

    def _advance(self, *, used: bool) -> None:
        """Send what becomes of the states in front of the next task."""
        task, chain = self._tasks[self._passed], self._chain
        self._workers = self._members.admitted()
        self._kept = self._kept & self._workers
        if used:
            self._waiting.append(self._send(use, chain, task, self._states, label=str(task)))
        behind = [
            self._send(step, chain, task, state, label=f"text, {task}", priority=1)
            for state in self._states
        ]
        for state in self._states:
            state.release()
        self._states = behind
        self._passed += 1

    def _fetched(
        self, done: Future[Sequence[Result]], meanwhile: Callable[[], None]
    ) -> list[Result]:
        """Result by result, so that no message holds them all."""
        count: int = self._answer(self._send(len, done, label="answer", job=False), meanwhile)
        parts = [self._send(getitem, done, n, label="answer", job=False) for n in range(count)]
        try:
            return [self._answer(part, meanwhile) for part in parts]
        finally:
            for part in parts:
                part.release()

    def _answer(self, future: Future[Any], meanwhile: Callable[[], None]) -> Any:
        while (found := self._link.answer(future)) is None:
            meanwhile()
            if not self._kept & self._members.there().keys():
                raise RelayLost
        return found

    def _send(
        self,
        function: Callable[..., Any],
        *args: Any,
        label: str,
        priority: int = 0,
        job: bool = True,
    ) -> Future[Any]:
        about = (self._job,) if job else ()
        return self._link.send(
            function, *about, *args, workers=self._workers, label=label, priority=priority
        )
