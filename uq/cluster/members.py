"""The workers of a scheduler: who is there, and who was examined and may take part."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from threading import RLock

from uq.cluster import link as module
from uq.cluster.admission import difference
from uq.cluster.link import CONTINUE, Link, Pace
from uq.cluster.worker import Facts, Job, facts, facts_of, hashes
from uq.errors import DeviceError, UqError
from uq.formats.checkpoint import Checkpoint
from uq.progress import Progress
from uq.quantize.farm import Result

RESTART = 15.0  # seconds without any worker before a run gives up: Dask starts a dead one again


class Members:
    """Workers may come and go: one that joins is examined before it is given anything.

    Attributes:
        names: of the admitted, by address.
    """

    def __init__(
        self, link: Link, job: Job, checkpoint: Checkpoint, progress: Progress, same_cpu: bool
    ) -> None:
        self._link = link
        self._job = job
        self._checkpoint = checkpoint
        self._progress = progress
        self._same_cpu = same_cpu
        self._here = facts_of(checkpoint)
        self.names: dict[str, str] = {}
        self._refused: dict[str, str] = {}  # address -> why
        self._lock = RLock()
        self._pace = Pace()
        self._seen: dict[str, int] = {}

    def threads(self) -> int:
        """Of the admitted that are there.

        Raises:
            DeviceError: there is no worker, or none that may take part.
        """
        try:
            self._link.client.wait_for_workers(1, timeout=module.PATIENCE)
        except TimeoutError:
            raise DeviceError(
                f"{self._link.address}: the scheduler has no workers; start one on each machine "
                f"with: dask worker {self._link.address}"
            ) from None
        workers = self.there()
        return sum(workers[address] for address in self._admit(workers))

    def there(self) -> dict[str, int]:
        """Address -> threads of every worker that was there a moment ago."""
        with self._lock:
            if self._pace.due():
                with self._link.connected():
                    found = self._link.client.scheduler_info()["workers"]
                self._seen = {address: int(worker["nthreads"]) for address, worker in found.items()}
            return self._seen

    def admitted(self) -> set[str]:
        """Admitted workers that are there, if need be after a restart.

        Raises:
            DeviceError: there are none any more.
        """
        deadline = time.monotonic() + RESTART
        while not (found := self._admit(self.there())):
            if time.monotonic() > deadline:
                raise DeviceError(
                    f"{self._link.address}: all workers are gone; {CONTINUE} with others"
                )
            self._link.closing.wait(module.POLL)
        return found

    def _admit(self, workers: Iterable[str]) -> set[str]:
        """Those that may take part. New ones are examined; one that is refused is named once.

        Raises:
            DeviceError: all are refused.
        """
        workers = set(workers)
        with self._lock:
            for address in sorted(workers - self.names.keys() - self._refused.keys()):
                self._examine(address)
            if workers and workers <= self._refused.keys():
                raise DeviceError(next(iter(self._refused.values())))
            return workers & self.names.keys()

    def _examine(self, address: str) -> None:
        workers = self._link.client.scheduler_info()["workers"]
        name = str(workers.get(address, {}).get("name", address))
        label = f"worker {address}" if name == address else f"worker {name} ({address})"
        try:
            reason = self._difference(address)
        except (UqError, ImportError, AttributeError) as error:
            reason = f"cannot take part: {error}"
        if reason is None:
            self.names[address] = name
            return
        self._refused[address] = f"{label} {reason}"
        self._progress.note(f"not used: {self._refused[address]}")

    def _difference(self, address: str) -> str | None:
        def ask(function: Callable[[Job], Result]) -> Result:
            return self._link.send(
                function, self._job, workers=[address], label="examination"
            ).result()

        there: Facts = ask(facts)
        return difference(
            self._here,
            there,
            self._same_cpu,
            self._checkpoint.contents,
            lambda: ask(hashes),
        )
