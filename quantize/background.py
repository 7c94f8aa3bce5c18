"""What is done while something else is in work."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from concurrent.futures import Future
from functools import partial
from threading import Thread
from typing import TypeVar

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


class LayersAhead:
    """Layers of a checkpoint in order: as one is given out, the reading of the next begins."""

    def __init__(self, checkpoint: Checkpoint, contents: MutableMapping[str, str]) -> None:
        """`contents`: the hashes of what is read are entered here."""
        self._checkpoint, self._contents = checkpoint, contents
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
        return in_background(partial(self._checkpoint.layer, layer, self._contents))
