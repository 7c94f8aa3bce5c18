"""What runs on a worker: it opens the checkpoint itself, says what it found, and works on it.

Dask sends these functions by name, so a worker runs the code that is installed there.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import llvmlite.binding as llvm
import numba
import numpy as np
from distributed import get_worker

import uq
from uq.cluster.link import Pace
from uq.formats.checkpoint import Checkpoint, Source, open_checkpoint
from uq.progress import SilentProgress
from uq.quantize.farm import Chain, Piece, Result, State, Task, Work

WORK, NOTE = "work", "note"  # kinds of messages


@dataclass(frozen=True)
class Job:
    """A checkpoint that a run works on.

    Attributes:
        run: another one for every run, so that no worker keeps what has changed in between.
        source: with the absolute path of a local checkpoint.
    """

    run: str
    source: Source


@dataclass(frozen=True)
class Facts:
    """What must be equal everywhere for equal bytes.

    Attributes:
        software: package -> version.
        cpu: kind of the processor, by which BLAS chooses its kernels.
        files: weight file -> size in bytes and version, see `WeightFile`.
    """

    software: dict[str, str]
    cpu: str
    files: dict[str, tuple[int, str]]


def installed() -> dict[str, str]:
    """The versions that the bytes of a bundle depend on."""
    return {
        "uq": uq.__version__,
        "Python": ".".join(platform.python_version_tuple()[:2]),
        "numpy": np.__version__,
        "numba": numba.__version__,
    }


def facts_of(checkpoint: Checkpoint) -> Facts:
    files = {name: (file.size, file.version) for name, file in checkpoint.files().items()}
    return Facts(installed(), llvm.get_host_cpu_name(), files)


def facts(job: Job) -> Facts:
    """Raises UqError: the checkpoint cannot be opened here."""
    return facts_of(opened(job))


def hashes(job: Job) -> dict[str, str]:
    """What of every weight file the model needs, as a hash."""
    return opened(job).contents()


@lru_cache(maxsize=1)
def opened(job: Job) -> Checkpoint:
    source = job.source
    return open_checkpoint(source.id, revision=source.revision, stream=source.kind == "hub")


def perform(job: Job, work: Work[Task, Result], tasks: Sequence[Task]) -> list[Result]:
    progress = Telling(job.run)
    return [work(opened(job), task, progress) for task in tasks]


def begin(job: Job, chain: Chain[Piece, Task, Result], piece: Piece) -> State:
    return chain.begin(opened(job), piece)


def use(
    job: Job, chain: Chain[Piece, Task, Result], task: Task, states: Sequence[State]
) -> Sequence[Result]:
    return chain.use(opened(job), task, states, Telling(job.run))


def step(job: Job, chain: Chain[Piece, Task, Result], task: Task, state: State) -> State:
    (found,) = chain.step(opened(job), task, [state])
    return found


class Dropped(Exception):
    """Nobody waits for this work any more."""


class Telling(SilentProgress):
    """Says what is in work, by way of the scheduler, to who waits for it; stops when nobody does.

    A message is (kind, key of the piece of work, text).
    """

    def __init__(self, topic: str) -> None:
        self._topic = topic
        self._worker = get_worker()
        self._key = self._worker.get_current_task()
        self._pace = Pace()

    def work(self, what: str) -> None:
        """Raises Dropped: the work was taken back."""
        state = self._worker.state.tasks.get(self._key)
        if state is None or state.state == "cancelled":
            raise Dropped
        if self._pace.due():
            self._worker.log_event(self._topic, (WORK, self._key, what))

    def advance(self, step: str, **figures: float) -> None:
        self.work(step)

    def note(self, text: str) -> None:
        self._worker.log_event(self._topic, (NOTE, self._key, text))
