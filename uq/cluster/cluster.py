"""A farm of Dask workers: work sent and fetched in order, deaths survived, one bar for all.

    with connect("tcp://10.0.0.1:8786", checkpoint, progress) as farm:
        quantize(checkpoint, out, options, progress, farm=farm)

Dask repeats what a dead worker had in hand on another one.
"""

from __future__ import annotations

import concurrent.futures
import uuid
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from itertools import chain as chained
from itertools import islice
from pathlib import Path
from typing import Any

from uq.cluster.link import POLL, Link, Pace, label_of, linked
from uq.cluster.members import Members
from uq.cluster.relay import Relay, RelayLost
from uq.cluster.worker import NOTE, Job, perform
from uq.formats.checkpoint import Checkpoint
from uq.progress import Progress
from uq.quantize.farm import Chain, Piece, Result, Task, Work, map_ahead

MESSAGES_AHEAD = 2  # per thread of a worker: one in work, one waiting
MOST_AHEAD = 256


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
    with linked(address) as link:
        cluster = Cluster(link, checkpoint, progress, same_cpu)
        try:
            yield cluster
        finally:
            cluster.close()


class Cluster:
    """See `Farm`; made by `connect`."""

    def __init__(
        self, link: Link, checkpoint: Checkpoint, progress: Progress, same_cpu: bool
    ) -> None:
        self._link = link
        self._progress = progress
        self._job = _job(checkpoint)
        self._members = Members(link, self._job, checkpoint, progress, same_cpu)
        self._threads = self._members.threads()
        self._ahead = min(MESSAGES_AHEAD * self._threads, MOST_AHEAD)
        self._pool = ThreadPoolExecutor(self._ahead, thread_name_prefix="uq-cluster")
        self._pace = Pace()
        self._told: dict[str, str] = {}  # key in work -> what its worker said last
        self._noted: set[str] = set()
        link.client.subscribe_topic(self._job.run, self._hear)

    def map(
        self, work: Work[Task, Result], tasks: Iterable[Task], *, ahead: int, together: int
    ) -> Iterator[Result]:
        """As in `Farm`; `ahead` gives way to `MESSAGES_AHEAD` for every thread of the workers."""
        messages = _groups(tasks, together)
        perform = partial(self._perform, work)
        answers = map_ahead(self._pool, perform, messages, self._ahead, self._watched)
        return chained.from_iterable(answers)

    def follow(
        self, chain: Chain[Piece, Task, Result], pieces: Sequence[Piece], tasks: Sequence[Task],
        *, first: int,
    ) -> Iterator[Sequence[Result]]:  # fmt: skip
        """As in `Farm`: each thread of the workers has a task, and one task waits."""
        while first < len(tasks):
            relay = Relay(self._link, self._members, self._job, chain, pieces, tasks)
            try:
                for found in relay.results(first, self._threads + 1, self.tell):
                    first += 1
                    yield found
            except RelayLost:  # nobody is left who may make what was lost again: anew, with others
                continue
            finally:
                relay.close()

    def close(self) -> None:
        """Drop what is in work."""
        self._link.closing.set()
        self._pool.shutdown(cancel_futures=True)

    def tell(self) -> None:
        """Now and then the bar says which worker does what."""
        if not self._pace.due():
            return
        with self._link.connected():
            processing = self._link.client.processing()
        in_work = {
            self._members.names[address]: keys[0]
            for address, keys in processing.items()
            if keys and address in self._members.names
        }
        if in_work:
            self._progress.work(
                ", ".join(
                    f"{_short(self._told.get(key, label_of(key)))} on {name}"
                    for name, key in sorted(in_work.items())
                )
            )

    def _hear(self, event: tuple[float, Any]) -> None:
        """What a worker says; a piece that is done again says its notes again."""
        kind, key, text = event[1]
        if kind != NOTE:
            self._told[key] = text
        elif text not in self._noted:
            self._noted.add(text)
            self._progress.note(text)

    def _perform(self, work: Work[Task, Result], tasks: Sequence[Task]) -> list[Result]:
        """Send one message, and wait for the answer through the deaths of workers."""
        what = str(tasks[0])
        while True:
            workers = self._members.admitted()
            future = self._link.send(perform, self._job, work, tasks, workers=workers, label=what)
            try:
                while workers & self._members.there().keys():
                    if (found := self._link.answer(future)) is not None:
                        return found
            finally:
                self._told.pop(str(future.key), None)
                future.release()

    def _watched(self, answer: concurrent.futures.Future[Result]) -> Result:
        """The answer; until it is there the bar is kept up to date."""
        while not concurrent.futures.wait([answer], timeout=POLL).done:
            self.tell()
        self.tell()
        return answer.result()


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
    """`model.layers.3.mlp.up_proj.weight` -> `layer 3 mlp.up_proj`."""
    parts = name.removesuffix(".weight").split(".")
    return f"layer {parts[2]} {'.'.join(parts[3:])}" if "layers" in parts else ".".join(parts)
