"""Tensors whose bytes are slow to get, fetched in blocks ahead of use by a few threads.

The blocks follow the order in which a model is read, not that of its files. Reading on from one
block to the next fetches what comes behind, the more the longer this goes on: a look at a few rows
costs one block. What is read together (a layer) is forgotten together, for its parts are read in
any order.
"""

from __future__ import annotations

import weakref
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from queue import SimpleQueue
from threading import Lock, Thread

import numpy as np

from uq.formats.checkpoint.fetched import Bytes, Fetched
from uq.formats.checkpoint.tensors import TensorInfo
from uq.formats.checkpoint.weight_file import WeightFile

BLOCK = 16 << 20  # bytes of one request: long beside its latency, short beside a retry
WORKERS = 8
THREAD = "uq-fetch"


@dataclass(frozen=True)
class Block:
    """Bytes `start:stop` of a file, which belong to a step of reading."""

    file: WeightFile
    start: int
    stop: int
    step: int = 0

    @property
    def size(self) -> int:
        return self.stop - self.start


def read_ahead(
    tensors: Mapping[str, TensorInfo],
    steps: Sequence[Sequence[str]],
    ahead: int,
    fetched: Fetched,
) -> dict[str, TensorInfo]:
    """The same tensors, fetched ahead of use.

    Args:
        steps: names of tensors that are read together, in the order of reading.
        ahead: bytes to fetch ahead, and to keep behind.
        fetched: what fetches them.
    """
    blocks = (cut([tensors[name] for name in step]) for step in steps)
    reader = BlockReader(list(in_steps(blocks, ahead)), ahead, fetched)
    return {
        name: replace(info, file=AheadFile(info.file, reader)) for name, info in tensors.items()
    }


def cut(tensors: Sequence[TensorInfo]) -> Iterator[Block]:
    """The bytes of some tensors as blocks; tensors that touch in their file share blocks."""
    spans: list[Block] = []
    for info in sorted(tensors, key=lambda info: (info.file.name, info.offset)):
        stop = info.offset + info.nbytes
        if spans and spans[-1].file.name == info.file.name and spans[-1].stop == info.offset:
            spans[-1] = replace(spans[-1], stop=stop)
        else:
            spans.append(Block(info.file, info.offset, stop))
    for span in spans:
        for start in range(span.start, span.stop, BLOCK):
            yield replace(span, start=start, stop=min(start + BLOCK, span.stop))


def in_steps(parts: Iterable[Iterable[Block]], ahead: int) -> Iterator[Block]:
    """The blocks of all parts; each part is a step, or several of at most `ahead` bytes."""
    step = 0
    for part in parts:
        size = 0
        for block in part:
            if size and size + block.size > ahead:
                step, size = step + 1, 0
            size += block.size
            yield replace(block, step=step)
        step += 1


Tasks = SimpleQueue[tuple[Fetched, Block, "Future[Bytes]"] | None]


@dataclass(frozen=True)
class AheadFile:
    """A weight file read through a `BlockReader`."""

    file: WeightFile
    reader: BlockReader

    @property
    def name(self) -> str:
        return self.file.name

    @property
    def size(self) -> int:
        return self.file.size

    @property
    def version(self) -> str:
        return self.file.version

    @property
    def stated_sha256(self) -> str | None:
        return self.file.stated_sha256

    def sha256(self) -> str:
        return self.file.sha256()

    def read(self, offset: int, nbytes: int) -> Bytes:
        return self.reader.read(self.name, offset, nbytes)


class BlockReader:
    """Blocks in their order of use; at most about `2 * ahead` bytes are held.

    Threads may read at the same time.
    """

    def __init__(self, blocks: Sequence[Block], ahead: int, fetched: Fetched) -> None:
        self._blocks = blocks
        self._ahead = ahead
        self._fetched = fetched
        self._held: dict[int, Future[Bytes]] = {}
        self._steps: OrderedDict[int, list[int]] = OrderedDict()  # held blocks; last used is last
        self._size = 0  # of all that is held
        self._lock = Lock()
        self._tasks: Tasks = SimpleQueue()
        self._places: dict[str, list[tuple[int, int]]] = {}  # file -> (start, index), ascending
        for index, block in enumerate(blocks):
            self._places.setdefault(block.file.name, []).append((block.start, index))
        for places in self._places.values():
            places.sort()
        for _ in range(WORKERS):
            Thread(target=work, name=THREAD, args=(self._tasks,), daemon=True).start()
        weakref.finalize(self, stop, self._tasks)

    def read(self, file: str, offset: int, nbytes: int) -> Bytes:
        """Bytes of a file; they must lie in blocks.

        Raises:
            CheckpointError, HubError: as reading the file does.
        """
        wanted = self._covering(file, offset, offset + nbytes)
        with self._lock:
            futures = [self._want(index) for index in wanted]
            self._fetch_behind(wanted[-1])
            self._forget(keep=wanted)
        parts = [
            future.result()[max(offset - block.start, 0) : offset + nbytes - block.start]
            for future, block in zip(futures, map(self._blocks.__getitem__, wanted), strict=True)
        ]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _covering(self, file: str, start: int, stop: int) -> list[int]:
        """Indices of the blocks that hold bytes `start:stop`."""
        places = self._places[file]
        first = bisect_right(places, (start, len(self._blocks))) - 1
        behind = bisect_right(places, (stop - 1, len(self._blocks)))
        return [index for _, index in places[first:behind]]

    def _want(self, index: int) -> Future[Bytes]:
        """The block's bytes, asked for if they are not held or could not be fetched before."""
        block, future = self._blocks[index], self._held.get(index)
        if future is None:
            self._steps.setdefault(block.step, []).append(index)
            self._size += block.size
        self._steps.move_to_end(block.step)
        if future is None or (future.done() and future.exception() is not None):
            future = self._held[index] = Future()
            self._tasks.put((self._fetched, block, future))
        return future

    def _fetch_behind(self, index: int) -> None:
        room = self._held_before(index)
        for following in range(index + 1, len(self._blocks)):
            room -= self._blocks[following].size
            if room < 0:
                return
            self._want(following)

    def _held_before(self, index: int) -> int:
        """Bytes of the blocks before one that are held without a gap; at most `ahead`."""
        size = 0
        while index > 0 and index - 1 in self._held and size < self._ahead:
            index -= 1
            size += self._blocks[index].size
        return min(size, self._ahead)

    def _forget(self, keep: Sequence[int]) -> None:
        """Drop the step that was not used for longest; what is still being fetched stays."""
        for step in list(self._steps):
            for index in list(self._steps[step]):
                if self._size <= 2 * self._ahead:
                    return
                if index not in keep and self._held[index].done():
                    self._drop(index)

    def _drop(self, index: int) -> None:
        block = self._blocks[index]
        del self._held[index]
        self._size -= block.size
        self._steps[block.step].remove(index)
        if not self._steps[block.step]:
            del self._steps[block.step]


def work(tasks: Tasks) -> None:
    """Fetch block after block until told to stop; ends with the program at the latest."""
    while (task := tasks.get()) is not None:
        fulfil(*task)
        del task  # a failure holds its traceback, and that the reader


def fulfil(fetched: Fetched, block: Block, future: Future[Bytes]) -> None:
    try:
        future.set_result(fetched.read(block.file, block.start, block.size))
    except BaseException as error:
        future.set_exception(error)


def stop(tasks: Tasks) -> None:
    for _ in range(WORKERS):
        tasks.put(None)
