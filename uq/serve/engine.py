"""The thread that owns the model: takes jobs from anywhere, reports back through their sinks."""

from __future__ import annotations

import os
import sys
import threading
import traceback
from collections import deque
from collections.abc import Sequence as Many
from concurrent.futures import Executor, Future
from types import TracebackType

from uq.errors import UqError
from uq.formats.tokenizer import Tokenizer
from uq.kernels.session import BatchSession
from uq.serve.job import Job, Sink
from uq.serve.metrics import Metrics
from uq.serve.scheduler import Scheduler
from uq.serve.sequence import Sequence


class QueueFull(UqError):
    """So many jobs are waiting that another would wait too long."""


class Ticket:
    """Jobs that were taken together."""

    def __init__(self, sequences: Many[Sequence]) -> None:
        self._sequences = sequences

    def cancel(self) -> None:
        """Nobody waits for them any more; they end with the current step. Harmless afterwards."""
        for sequence in self._sequences:
            sequence.gone = True


class Engine:
    """Runs a `Scheduler` in a thread that alone has the session, within a `with` block."""

    def __init__(
        self,
        session: BatchSession,
        tokenizer: Tokenizer,
        metrics: Metrics,
        *,
        thread: Executor,
        queue: int,
    ) -> None:
        """
        Args:
            thread: of one worker, which opened the session: OpenMP keeps a team for every thread
                that ever began parallel work, and where two teams exceed the cores, each goes to
                sleep between two loops (decoding took 1.3 times as long).
            queue: jobs that may wait beside those for which there is a slot.
        """
        self._tokenizer, self._thread, self._queue = tokenizer, thread, queue
        self._scheduler = Scheduler(session, metrics)
        metrics.waiting.set_function(lambda: len(self._scheduler.waiting))
        metrics.running.set_function(lambda: len(self._scheduler.running))
        self._arrived: deque[Sequence] = deque()
        self._changed = threading.Condition()
        self._closed = self._ending = False
        self._work: Future[None] | None = None

    def __enter__(self) -> Engine:
        self._work = self._thread.submit(self._run)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End behind the current step. Jobs that are not over are never reported again."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        assert self._work is not None
        self._work.result()

    def submit(self, jobs: Many[tuple[Job, Sink]]) -> Ticket:
        """Queue jobs, all or none. Sinks are called in the engine's thread and must not wait.

        Raises:
            QueueFull: there is no room for them all, or `end_all` was called.
        """
        sequences = [Sequence(job, self._tokenizer, sink) for job, sink in jobs]
        with self._changed:
            if self._ending:
                raise QueueFull("the server is being stopped")
            waiting = len(self._arrived) + len(self._scheduler.waiting)
            if waiting + len(sequences) > self._queue + self._scheduler.free:
                raise QueueFull(f"{waiting} of at most {self._queue} requests are waiting already")
            self._arrived.extend(sequences)
            self._changed.notify()
        return Ticket(sequences)

    def end_all(self) -> None:
        """Tell all jobs that they get no answer, behind the current step, and take no others."""
        with self._changed:
            self._ending = True
            self._changed.notify()

    def _run(self) -> None:
        while self._take():
            try:
                if self._ending:
                    self._scheduler.end_all("the server was stopped")
                self._scheduler.step()
            except Exception as error:  # reported to those it concerns; the others go on
                print(f"uq: a step failed: {type(error).__name__}: {error}", file=sys.stderr)
                if os.environ.get("UQ_DEBUG") == "1":
                    traceback.print_exc()

    def _take(self) -> bool:
        """Wait for something to do; False when the engine is closed."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._closed or self._arrived or not self._scheduler.idle
            )
            self._scheduler.waiting.extend(self._arrived)
            self._arrived.clear()
        return not self._closed
