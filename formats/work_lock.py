"""The lock of a work folder: one run at a time writes a bundle."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock

from uq.errors import UsageError

LOCK = "lock"


class WorkLock:
    """Held until the last of those who write in the folder lets go.

    A second Ctrl-C ends the wait for a thread that writes, not the thread: until it has ended, no
    other run may begin.
    """

    def __init__(self, work: Path) -> None:
        """Create the work folder if need be and lock it.

        Raises:
            UsageError: another run holds the lock.
        """
        self._descriptor = _locked(work)
        self._holders, self._counting = 1, Lock()

    @property
    def alone(self) -> bool:
        """Whether nobody else writes."""
        return self._holders == 1

    def take(self) -> None:
        """One more writes; for whom `let_go` is called when he is done."""
        with self._counting:
            self._holders += 1

    def let_go(self) -> None:
        with self._counting:
            self._holders -= 1
            if self._holders == 0:
                os.close(self._descriptor)

    @contextmanager
    def held(self) -> Iterator[None]:
        self.take()
        try:
            yield
        finally:
            self.let_go()


def _locked(work: Path) -> int:
    """The descriptor that holds the lock."""
    while True:
        work.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(work / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        except FileNotFoundError:  # another run has just removed or renamed the folder
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(descriptor)
            if not isinstance(error, BlockingIOError):
                raise
            raise UsageError(
                f"{work}: another run{_process(work / LOCK)} is writing it; wait for it or choose "
                "another -o"
            ) from error
        if (work / LOCK).exists() and os.path.samestat(os.fstat(descriptor), (work / LOCK).stat()):
            os.ftruncate(descriptor, 0)
            os.write(descriptor, str(os.getpid()).encode())
            return descriptor
        os.close(descriptor)  # locked, but renamed or removed in the meantime


def _process(lock: Path) -> str:
    """Who holds a lock, as far as it says so."""
    try:
        number = lock.read_bytes()[:20]
    except OSError:
        return ""
    return f" (process {int(number)})" if number.isdigit() else ""
