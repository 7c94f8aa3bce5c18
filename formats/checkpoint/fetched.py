"""What was fetched of files that are slow to read, kept on the disk for the next time."""

from __future__ import annotations

import os
import tempfile
import weakref
from pathlib import Path
from threading import Lock
from typing import IO

import numpy as np
from numpy.typing import NDArray

from uq.formats.checkpoint.weight_file import WeightFile
from uq.formats.disk import disk_errors

Bytes = NDArray[np.uint8]
Key = tuple[str, int, int]  # file, offset, bytes


class Fetched:
    """Keeps nothing until it is given a folder. Threads may read at the same time.

    The file has no name: it is gone with the process, however that ends. A disk that fails costs
    fetching again, and nothing else.
    """

    def __init__(self) -> None:
        self.most = 0  # bytes that may be kept
        self._file: IO[bytes] | None = None
        self._places: dict[Key, int] = {}
        self._end = 0
        self._lock = Lock()

    def keep_in(self, folder: Path, most: int) -> None:
        """From now on keep what is fetched on the disk of a folder, up to so many bytes.

        Raises DeviceError: the folder cannot be written.
        """
        with disk_errors(folder, 0):
            self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
        self.most = most
        weakref.finalize(self, self._file.close)

    def read(self, file: WeightFile, offset: int, nbytes: int) -> Bytes:
        """Bytes of a file, from the disk where the same were read before.

        Raises:
            CheckpointError, HubError: as reading the file does.
        """
        key = file.name, offset, nbytes
        found = self._kept(key)
        if found is None:
            found = file.read(offset, nbytes)
            self._keep(key, found)
        return found

    def _kept(self, key: Key) -> Bytes | None:
        with self._lock:
            place, file = self._places.get(key), self._file
        if place is None or file is None:
            return None
        data = np.empty(key[2], np.uint8)
        try:
            whole = os.preadv(file.fileno(), [data.data], place) == len(data)
        except OSError:
            whole = False
        data.flags.writeable = False
        return data if whole else None

    def _keep(self, key: Key, data: Bytes) -> None:
        with self._lock:
            place, file = self._end, self._file
            if file is None or place + len(data) > self.most:
                return
            self._end += len(data)
        try:
            whole = os.pwrite(file.fileno(), data.data, place) == len(data)
        except OSError:
            whole = False
        with self._lock:
            if whole:
                self._places[key] = place
            else:
                self._give_up()

    def _give_up(self) -> None:
        """Leave the room to what needs it more."""
        if self._file is not None:
            os.truncate(self._file.fileno(), 0)
        self._file, self._places, self._end, self.most = None, {}, 0, 0
