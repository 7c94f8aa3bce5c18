"""What is done while something else is in work."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from threading import Event, Thread
from typing import Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from uq.formats.checkpoint import Checkpoint

Result = TypeVar("Result")
LayerRead = Callable[[], dict[str, NDArray[np.float32]]]


def in_background(work: Callable[[], Result]) -> Callable[[], Result]:
    """Start `work` in a thread that does not outlive the program; the call waits for its result."""
    future: Future[Result] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    Thread(target=run, daemon=True).start()
    return future.result


class Writing:
    """One piece of writing at a time, in a thread, while other work goes on.

    Attributes:
        idle: set while nothing is being written.
    """

    def __init__(self) -> None:
        self.idle = Event()
        self.idle.set()
        self._pool = ThreadPoolExecutor(1)
        self._under_way: Future[None] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Writing that has begun comes to its end, also behind an error elsewhere."""
        self._pool.shutdown()

    def start(self, write: Callable[[], object]) -> None:
        """Behind what is under way, whose error is raised here."""
        self.wait()
        self.idle.clear()
        self._under_way = self._pool.submit(self._run, write)

    def wait(self) -> None:
        """Until nothing is under way; raises what that writing raised."""
        under_way, self._under_way = self._under_way, None
        if under_way is not None:
            under_way.result()

    def _run(self, write: Callable[[], object]) -> None:
        try:
            write()
        finally:
            self.idle.set()


class LayersAhead:
    """Layers of a checkpoint in order: as one is given out, the reading of the next begins.

    It waits for writing to end: a layer that is read, one in work and one being written would else
    be in memory together.
    """

    def __init__(
        self, checkpoint: Checkpoint, contents: MutableMapping[str, str], idle: Event
    ) -> None:
        """
        Args:
            contents: the hashes of what is read are entered here.
            idle: set while nothing is being written.
        """
        self._checkpoint, self._contents, self._idle = checkpoint, contents, idle
        self._next: tuple[int, LayerRead] | None = None

    def __call__(self, layer: int) -> dict[str, NDArray[np.float32]]:
        """As `Checkpoint.layer`."""
        read, self._next = self._next, None
        wait = read[1] if read is not None and read[0] == layer else self._begin(layer)
        found = wait()
        if layer + 1 < self._checkpoint.config.num_layers:
            self._next = (layer + 1, self._begin(layer + 1))
        return found

    def _begin(self, layer: int) -> LayerRead:
        return in_background(partial(self._read, layer))

    def _read(self, layer: int) -> dict[str, NDArray[np.float32]]:
        self._idle.wait()
        return self._checkpoint.layer(layer, self._contents)
