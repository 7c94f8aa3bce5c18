"""What runs on a worker: it opens the checkpoint itself, says what it found, and works on it.

Dask sends these functions by name, so a worker runs the code that is installed there.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

import llvmlite.binding as llvm
import numba
import numpy as np

import uq
from uq.formats.checkpoint import Checkpoint, Source, open_checkpoint

Task = TypeVar("Task")
Result = TypeVar("Result")


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


def perform(
    job: Job, work: Callable[[Checkpoint, Task], Result], tasks: Sequence[Task]
) -> list[Result]:
    return [work(opened(job), task) for task in tasks]
