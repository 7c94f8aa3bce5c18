"""The connection to a scheduler: work sent and answers fetched; what is said when it is gone."""

from __future__ import annotations

import logging
import time
import uuid
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError
from contextlib import contextmanager
from threading import Event
from typing import Any, TypeVar

from uq.errors import DeviceError, ToolMissing

try:
    from distributed import Client, Future, KilledWorker, wait
except ModuleNotFoundError as missing:
    raise ToolMissing(
        f"--scheduler needs the package {missing.name}; run: pip install 'unicorn-quant[cluster]'"
    ) from missing

Result = TypeVar("Result")

PATIENCE = 5.0  # seconds for a scheduler to answer, and for a first worker
POLL = 0.5
TRANSFER = 60.0  # for one answer
CONTINUE = "the same command continues"


class Link:
    """A client of a scheduler; every thread may use it."""

    def __init__(self, client: Client, address: str) -> None:
        self.client = client
        self.address = address
        self.closing = Event()

    def send(
        self,
        function: Callable[..., Result],
        *args: Any,
        workers: Iterable[str],
        label: str,
        priority: int = 0,
    ) -> Future[Result]:
        """Have a function called on one of the workers.

        Args:
            args: futures among them, in lists too, stand for their results.
            label: tells the user what is in work, see `label_of`.
            priority: what has more of it goes first.
        """
        with self.connected():
            key = f"{label}-{uuid.uuid4().hex}"
            return self.client.submit(
                function, *args, key=key, workers=list(workers), pure=False, priority=priority
            )

    def answer(self, future: Future[Result]) -> Result | None:
        """None while there is no answer yet, after `POLL` seconds.

        Raises:
            DeviceError: too many workers died at it, or the scheduler is gone.
            Exception: what was raised on the worker.
        """
        with self.connected():
            try:
                wait(future, timeout=POLL)
                if future.status == "finished":
                    return future.result(timeout=TRANSFER)
            except TimeoutError:  # its worker may have died with the answer: Dask makes it again
                return None
        if future.status != "error":
            return None
        error = future.exception()
        if isinstance(error, KilledWorker):
            raise DeviceError(
                f"{label_of(str(error.task))}: {error.allowed_failures + 1} workers died at it, "
                f"the last one {error.last_worker.address}; their logs say why (often memory: give "
                f"each worker fewer threads); {CONTINUE}"
            )
        assert error is not None
        raise error

    @contextmanager
    def connected(self) -> Iterator[None]:
        """Raises what is to be said when the scheduler is gone, CancelledError in the end."""
        if self.closing.is_set():
            raise CancelledError
        try:
            yield
        except (CancelledError, OSError, KeyError) as error:  # KeyError: it told of no workers
            raise DeviceError(f"{self.address}: the scheduler is gone; {CONTINUE}") from error


def label_of(key: str) -> str:
    return key.rpartition("-")[0]


@contextmanager
def linked(address: str) -> Iterator[Link]:
    """Raises DeviceError: no scheduler answers."""
    with _silent():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about versions, which are examined here
                client = Client(address, timeout=PATIENCE, name="uq")
        except (OSError, ValueError, TypeError) as error:
            raise DeviceError(
                f"{address}: no scheduler answers there ({error}); start one with: dask scheduler"
            ) from None
        try:
            yield Link(client, address)
        finally:
            client.close(timeout=PATIENCE)


@contextmanager
def _silent() -> Iterator[None]:
    """Dask logs to the terminal what is said here in one line."""
    logger = logging.getLogger("distributed")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(level)


class Pace:
    """Says when `POLL` seconds have passed since it last did."""

    def __init__(self) -> None:
        self._last = -POLL

    def due(self) -> bool:
        now = time.monotonic()
        if now - self._last <= POLL:
            return False
        self._last = now
        return True
