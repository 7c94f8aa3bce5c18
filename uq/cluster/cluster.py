"""A farm of Dask workers: who is admitted, work sent and fetched in order, deaths survived.

    with connect("tcp://10.0.0.1:8786", checkpoint, progress) as farm:
        quantize(checkpoint, out, options, progress, farm=farm)

Dask repeats what a dead worker had in hand on another one. Workers may come and go: one that joins
is examined like the first ones before it is given anything.
"""

from __future__ import annotations

import logging
import time
import uuid
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from itertools import chain, islice
from pathlib import Path
from threading import Event, RLock
from typing import Any, TypeVar

from uq.cluster.admission import difference
from uq.cluster.worker import Facts, Job, facts, facts_of, hashes, perform
from uq.errors import DeviceError, ToolMissing, UqError
from uq.formats.checkpoint import Checkpoint
from uq.progress import Progress
from uq.quantize.farm import map_ahead

try:
    from distributed import Client, Future, KilledWorker, wait
except ModuleNotFoundError as missing:
    raise ToolMissing(
        f"--scheduler needs the package {missing.name}; run: pip install 'unicorn-quant[cluster]'"
    ) from missing

Task = TypeVar("Task")
Result = TypeVar("Result")

PATIENCE = 5.0  # seconds for a scheduler to answer, and for a first worker
RESTART = 15.0  # seconds without any worker before a run gives up: Dask starts a dead one again
POLL = 0.5
TRANSFER = 60.0  # for one answer
MESSAGES_AHEAD = 2  # per thread of a worker: one in work, one waiting
MOST_AHEAD = 256
CONTINUE = "the same command continues"


@contextmanager
def connect(
    address: str, checkpoint: Checkpoint, progress: Progress, *, same_cpu: bool = False
) -> Iterator[Cluster]:
    """The workers of a scheduler as a farm.

    Args:
        address: `tcp://host:port`, or `tls://` with Dask's own configuration of certificates.
        same_cpu: admit workers with this kind of processor only.

    Raises:
        DeviceError: no scheduler answers, or it has no worker that can be admitted.
    """
    with _silent(), _client(address) as client:
        cluster = Cluster(client, address, checkpoint, progress, same_cpu)
        try:
            yield cluster
        finally:
            cluster.close()


class Cluster:
    """See `Farm`; made by `connect`."""

    def __init__(
        self,
        client: Client,
        address: str,
        checkpoint: Checkpoint,
        progress: Progress,
        same_cpu: bool,
    ) -> None:
        self._client = client
        self._address = address
        self._checkpoint = checkpoint
        self._progress = progress
        self._same_cpu = same_cpu
        self._job = _job(checkpoint)
        self._here = facts_of(checkpoint)
        self._names: dict[str, str] = {}  # of the admitted, by address
        self._refused: dict[str, str] = {}  # address -> why
        self._lock = RLock()
        self._closing = Event()
        self._told = self._looked = -POLL  # when the bar was told, and the workers were looked at
        self._seen: dict[str, int] = {}
        workers = self._first_workers()
        threads = sum(workers[address] for address in self._admit(workers))
        self._ahead = min(MESSAGES_AHEAD * threads, MOST_AHEAD)
        self._pool = ThreadPoolExecutor(self._ahead, thread_name_prefix="uq-cluster")

    def map(
        self,
        work: Callable[[Checkpoint, Task], Result],
        tasks: Iterable[Task],
        *,
        ahead: int,
        together: int,
    ) -> Iterator[Result]:
        """As in `Farm`; `ahead` gives way to `MESSAGES_AHEAD` for every thread of the workers."""
        messages = _groups(tasks, together)
        answers = map_ahead(self._pool, partial(self._perform, work), messages, self._ahead)
        return chain.from_iterable(self._told_of(answers))

    def close(self) -> None:
        """Drop what is in work."""
        self._closing.set()
        self._pool.shutdown(cancel_futures=True)

    def _perform(
        self, work: Callable[[Checkpoint, Task], Result], tasks: Sequence[Task]
    ) -> list[Result]:
        """Send one message, and wait for the answer through the deaths of workers."""
        what = str(tasks[0])
        while True:
            workers = self._wait_for_workers()
            future = self._send(perform, work, tasks, workers=workers, label=what)
            try:
                while workers & self._workers().keys():
                    if (found := self._answer(future, what)) is not None:
                        return found
            finally:
                future.release()

    def _send(
        self, function: Callable[..., Result], *args: Any, workers: Iterable[str], label: str
    ) -> Future[Result]:
        key = f"{label}-{uuid.uuid4().hex}"
        return self._client.submit(
            function, self._job, *args, key=key, workers=list(workers), pure=False
        )

    def _answer(self, future: Future[Result], what: str) -> Result | None:
        """None while there is no answer yet."""
        with self._connected():
            try:
                wait(future, timeout=POLL)
                if future.status == "finished":
                    return future.result(timeout=TRANSFER)
            except TimeoutError:  # its worker may have died with the answer: Dask makes it again
                return None
        error = future.exception()
        if isinstance(error, KilledWorker):
            raise DeviceError(
                f"{what}: {error.allowed_failures + 1} workers died at it, the last one "
                f"{error.last_worker.address}; their logs say why (often memory: give each worker "
                f"fewer threads); {CONTINUE}"
            )
        assert error is not None
        raise error

    def _first_workers(self) -> dict[str, int]:
        try:
            self._client.wait_for_workers(1, timeout=PATIENCE)
        except TimeoutError:
            raise DeviceError(
                f"{self._address}: the scheduler has no workers; start one on each machine with: "
                f"dask worker {self._address}"
            ) from None
        return self._workers()

    def _workers(self) -> dict[str, int]:
        """Address -> threads of every worker that was there a moment ago."""
        with self._lock:
            if time.monotonic() - self._looked > POLL:
                with self._connected():
                    found = self._client.scheduler_info()["workers"]
                self._seen = {address: int(worker["nthreads"]) for address, worker in found.items()}
                self._looked = time.monotonic()
            return self._seen

    def _wait_for_workers(self) -> set[str]:
        """Admitted workers that are there, if need be after a restart."""
        deadline = time.monotonic() + RESTART
        while not (found := self._admit(self._workers())):
            if time.monotonic() > deadline:
                raise DeviceError(f"{self._address}: all workers are gone; {CONTINUE} with others")
            self._closing.wait(POLL)
        return found

    def _admit(self, workers: Iterable[str]) -> set[str]:
        """Those that may take part. New ones are examined; one that is refused is named once.

        Raises:
            DeviceError: all are refused.
        """
        workers = set(workers)
        with self._lock:
            for address in sorted(workers - self._names.keys() - self._refused.keys()):
                self._examine(address)
            if workers and workers <= self._refused.keys():
                raise DeviceError(next(iter(self._refused.values())))
            return workers & self._names.keys()

    def _examine(self, address: str) -> None:
        name = str(self._client.scheduler_info()["workers"].get(address, {}).get("name", address))
        label = f"worker {address}" if name == address else f"worker {name} ({address})"
        try:
            reason = self._difference(address)
        except (UqError, ImportError, AttributeError) as error:
            reason = f"cannot take part: {error}"
        if reason is None:
            self._names[address] = name
            return
        self._refused[address] = f"{label} {reason}"
        self._progress.note(f"not used: {self._refused[address]}")

    def _difference(self, address: str) -> str | None:
        def ask(function: Callable[[Job], Result]) -> Result:
            return self._send(function, workers=[address], label="examination").result()

        there: Facts = ask(facts)
        return difference(
            self._here,
            there,
            self._same_cpu,
            self._checkpoint.contents,
            lambda: ask(hashes),
        )

    def _told_of(self, answers: Iterator[list[Result]]) -> Iterator[list[Result]]:
        """The answers; now and then the bar says which worker does what."""
        for answer in answers:
            if time.monotonic() - self._told > POLL:
                self._told = time.monotonic()
                with self._connected():
                    in_work = self._in_work()
                if in_work:
                    self._progress.work(in_work)
            yield answer

    def _in_work(self) -> str:
        tasks = {
            self._names[address]: keys[0].rpartition("-")[0]
            for address, keys in self._client.processing().items()
            if keys and address in self._names
        }
        return ", ".join(f"{_short(what)} on {name}" for name, what in sorted(tasks.items()))

    @contextmanager
    def _connected(self) -> Iterator[None]:
        """Raises what is to be said when the scheduler is gone, CancelledError in the end."""
        if self._closing.is_set():
            raise CancelledError
        try:
            yield
        except (CancelledError, OSError, KeyError) as error:  # KeyError: it told of no workers
            raise DeviceError(f"{self._address}: the scheduler is gone; {CONTINUE}") from error


@contextmanager
def _client(address: str) -> Iterator[Client]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about versions, which are examined here
            client = Client(address, timeout=PATIENCE, name="uq")
    except (OSError, ValueError, TypeError) as error:
        raise DeviceError(
            f"{address}: no scheduler answers there ({error}); start one with: dask scheduler"
        ) from None
    try:
        yield client
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


def _job(checkpoint: Checkpoint) -> Job:
    source = checkpoint.source
    if source.kind in ("folder", "gguf"):
        source = type(source)(source.kind, str(Path(source.id).absolute()))
    return Job(uuid.uuid4().hex, source)


def _groups(tasks: Iterable[Task], size: int) -> Iterator[list[Task]]:
    left = iter(tasks)
    while group := list(islice(left, size)):
        yield group


def _short(name: str) -> str:
    """`model.layers.3.mlp.up_proj.weight` -> `layer 3`."""
    parts = name.split(".")
    return f"layer {parts[2]}" if "layers" in parts else name.removesuffix(".weight")
