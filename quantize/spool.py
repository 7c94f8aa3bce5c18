"""Arrays that wait on the disk until they are asked for."""

from __future__ import annotations

import tempfile
import weakref
from collections.abc import Hashable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from uq.formats.disk import disk_errors

Array = NDArray[np.float32]


class Spool:
    """Float32 arrays in a file without a name, which is gone with the process, however it ends."""

    def __init__(self, folder: Path) -> None:
        """Raises DeviceError: the folder cannot be written."""
        self._folder = folder
        self._places: dict[Hashable, tuple[int, tuple[int, ...]]] = {}
        with disk_errors(folder, 0):
            self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
        weakref.finalize(self, self._file.close)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._places

    def __setitem__(self, key: Hashable, array: Array) -> None:
        """Raises DeviceError: the disk is full or broken."""
        with disk_errors(self._folder, array.nbytes):
            place = self._file.seek(0, 2)
            self._file.write(np.ascontiguousarray(array, np.float32).data)
            self._file.flush()
        self._places[key] = place, array.shape

    def __getitem__(self, key: Hashable) -> Array:
        """Raises DeviceError: the disk is broken."""
        place, shape = self._places[key]
        found = np.empty(shape, np.float32)
        with disk_errors(self._folder, 0):
            self._file.seek(place)
            self._file.readinto(found.data.cast("B"))
        return found
