"""Where the tokens of a GPU's calibration wait between two stages: on the device, or in a file."""

from __future__ import annotations

import tempfile
import weakref
from pathlib import Path
from typing import Protocol

import numpy as np

from uq.formats.disk import disk_errors
from uq.kernels.vulkan.dense.matrix import Matrix
from uq.kernels.vulkan.dense.stream import Stream


class Waiting(Protocol):
    """Matrices of batches of tokens, by what they are and the number of the batch."""

    def name(self, what: str, number: int, tokens: int) -> str:
        """Of the matrix in the `Store`; `tokens` of the batch."""
        ...

    def keep(self, what: str, number: int, matrix: Matrix) -> None:
        """The matrix was written."""
        ...

    def fetch(self, what: str, number: int, matrix: Matrix) -> None:
        """The matrix is to be read: as it was kept."""
        ...


class OnDevice:
    """Each batch has memory of its own."""

    def name(self, what: str, number: int, tokens: int) -> str:
        return f"{what} {number}"

    def keep(self, what: str, number: int, matrix: Matrix) -> None: ...
    def fetch(self, what: str, number: int, matrix: Matrix) -> None: ...


class OnDisk:
    """Batches share the memory of one; a file without a name, gone with the process, has all.

    What is on the device is the same, bit for bit. Batches of another size, as the last one may be,
    have memory of their own: the zeros behind the tokens of one are no tokens of another.
    """

    def __init__(self, stream: Stream, folder: Path) -> None:
        """Raises DeviceError: the folder cannot be written."""
        self._stream, self._folder = stream, folder
        self._places: dict[tuple[str, int, int], int] = {}  # layers differ in width
        self._end = 0
        with disk_errors(folder, 0):
            self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
        weakref.finalize(self, self._file.close)

    def name(self, what: str, number: int, tokens: int) -> str:
        return f"{what} of {tokens} tokens"

    def keep(self, what: str, number: int, matrix: Matrix) -> None:
        """Raises DeviceError: the disk is full or broken, or the device fails."""
        data = self._stream.read(matrix.span)
        place = self._places.setdefault((what, number, data.nbytes), self._end)
        self._end = max(self._end, place + data.nbytes)
        with disk_errors(self._folder, data.nbytes):
            self._file.seek(place)
            self._file.write(data.data)
            self._file.flush()

    def fetch(self, what: str, number: int, matrix: Matrix) -> None:
        """Raises DeviceError: the disk is broken, or the device fails."""
        data = np.empty(matrix.span.nbytes, np.uint8)
        with disk_errors(self._folder, 0):
            self._file.seek(self._places[what, number, data.nbytes])
            self._file.readinto(data.data)
        self._stream.write(matrix.span, data)
