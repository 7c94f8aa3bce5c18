"""Where the calibration tokens wait between two stages: in memory, or in a file."""

from __future__ import annotations

import tempfile
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from uq.formats.disk import disk_errors
from uq.kernels.per_layer import Beside

Array = NDArray[np.float32]


@dataclass(frozen=True)
class Batch:
    """Some sequences on their way through a layer.

    Attributes:
        hidden: (sequences, length, hidden) residual stream.
        x: (sequences, length, n) input of the current stage's linears.
        out: (sequences, length, hidden) output of the stage's linear, where it is already known.
        beside: what else goes with the sequences; all but its streams always in memory.
    """

    hidden: Array
    x: Array
    out: Array | None = None
    beside: Beside = field(default_factory=Beside)

    def at(self, x: Array, hidden: Array | None = None) -> Batch:
        """The same sequences at another stage, whose input is `x`."""
        return Batch(self.hidden if hidden is None else hidden, x, None, self.beside)

    @classmethod
    def between_layers(cls, hidden: Array, beside: Beside) -> Batch:
        return cls(hidden, hidden, beside=beside)

    def spilled(self) -> dict[str, Array]:
        """What need not be in memory."""
        arrays = {name: getattr(self, name) for name in ARRAYS}
        arrays["streams"] = self.beside.streams
        if self.x is self.hidden:
            del arrays["x"]
        return {name: array for name, array in arrays.items() if array is not None}

    def __sizeof__(self) -> int:
        """Bytes of all arrays: by this, Dask decides what a worker keeps in memory."""
        shared = (array for pair in self.beside.shared.values() for array in pair)
        beside = (self.beside.embedded, self.beside.tokens, *shared)
        arrays = (*self.spilled().values(), *beside)
        return sum(array.nbytes for array in arrays if array is not None)


ARRAYS = ("hidden", "x", "out")


class Activations(Protocol):
    """Batches by their place. A list is one."""

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[Batch]: ...
    def __getitem__(self, index: int, /) -> Batch: ...
    def __setitem__(self, index: int, batch: Batch, /) -> None: ...
    def append(self, batch: Batch, /) -> None: ...


class SpilledActivations:
    """Batches in a file without a name, which is gone with the process, however that ends.

    They are read and written, not mapped: what waits here is no memory of the process.
    """

    def __init__(self, folder: Path, batch_bytes: int) -> None:
        """`batch_bytes` is what a batch takes at most.

        Raises:
            DeviceError: the folder cannot be written.
        """
        self._folder = folder
        self._room = batch_bytes
        self._shapes: list[dict[str, tuple[int, ...]]] = []
        self._beside: list[Beside] = []
        with disk_errors(folder, 0):
            self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
        weakref.finalize(self, self._file.close)

    def __len__(self) -> int:
        return len(self._shapes)

    def __iter__(self) -> Iterator[Batch]:
        return (self[index] for index in range(len(self)))

    def append(self, batch: Batch) -> None:
        self._shapes.append({})
        self._beside.append(Beside())
        self[len(self) - 1] = batch

    def __setitem__(self, index: int, batch: Batch) -> None:
        """Raises DeviceError: the disk is full or broken."""
        present = batch.spilled()
        if sum(array.nbytes for array in present.values()) > self._room:
            raise ValueError(f"a batch of more than {self._room} bytes")
        self._beside[index] = _without_streams(batch.beside)
        self._shapes[index] = {name: array.shape for name, array in present.items()}
        with disk_errors(self._folder, self._room):
            self._file.seek(index * self._room)
            for array in present.values():
                self._file.write(np.ascontiguousarray(array).data)
            self._file.flush()

    def __getitem__(self, index: int) -> Batch:
        """Raises DeviceError: the disk is broken."""
        found = {name: np.empty(shape, np.float32) for name, shape in self._shapes[index].items()}
        with disk_errors(self._folder, 0):
            self._file.seek(index * self._room)
            for array in found.values():
                self._file.readinto(array.data.cast("B"))
        x, out, beside = found.get("x", found["hidden"]), found.get("out"), self._beside[index]
        if "streams" in found:
            beside = replace(beside, streams=found["streams"])
        return Batch(found["hidden"], x, out, beside)


def _without_streams(beside: Beside) -> Beside:
    return beside if beside.streams is None else replace(beside, streams=None)
