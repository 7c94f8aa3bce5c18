"""A file of weights, on this disk or elsewhere: its size, its hash, any part of its bytes."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from uq.errors import CheckpointError, DeviceError

HASH_BLOCK = 1 << 24


class WeightFile(Protocol):
    """Where tensors lie.

    Attributes:
        version: changes when the content does.
        stated_sha256: of the whole file, where its source states it; it need not be read again.
    """

    @property
    def name(self) -> str: ...
    @property
    def size(self) -> int: ...
    @property
    def version(self) -> str: ...
    @property
    def stated_sha256(self) -> str | None: ...

    def read(self, offset: int, nbytes: int) -> NDArray[np.uint8]:
        """Bytes `offset:offset + nbytes`, read-only.

        Raises:
            CheckpointError: the file is gone, or was cut after it was opened.
            DeviceError: the disk failed.
            HubError: the network, for a file on the Hub.
        """
        ...

    def sha256(self) -> str:
        """Of the whole file, in hex."""
        ...


@dataclass(frozen=True)
class LocalFile:
    """A file on this disk, read into fresh memory.

    It is not mapped: a disk that fails under a mapping, or a file that is cut, kills the process.
    """

    path: Path

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def size(self) -> int:
        return self.path.stat().st_size

    @property
    def version(self) -> str:
        """Times of the last change, of which no program can set the second, and the inode."""
        found = self.path.stat()
        return f"{found.st_mtime_ns} {found.st_ctime_ns} {found.st_ino}"

    @property
    def stated_sha256(self) -> None:
        return None

    def read(self, offset: int, nbytes: int) -> NDArray[np.uint8]:
        where = f"{nbytes} bytes at {offset}"
        data = np.empty(nbytes, np.uint8)
        rest = data.data
        with disk_reads(self.path, where), self.path.open("rb", buffering=0) as file:
            while rest and (count := os.preadv(file.fileno(), [rest], offset)):
                rest, offset = rest[count:], offset + count
        if rest:
            raise CheckpointError(f"{self.name}: cannot read {where}: the file was cut short")
        data.flags.writeable = False
        return data

    def sha256(self) -> str:
        """In large steps, which seldom wait for the interpreter's lock."""
        digest, block = hashlib.sha256(), bytearray(HASH_BLOCK)
        with disk_reads(self.path, "all of it"), self.path.open("rb", buffering=0) as file:
            while count := file.readinto(block):
                digest.update(memoryview(block)[:count])
        return digest.hexdigest()


@contextmanager
def disk_reads(path: Path, what: str) -> Iterator[None]:
    """Turn an `OSError` of reading into a line."""
    try:
        yield
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: is gone; put it back") from error
    except OSError as error:
        raise DeviceError(
            f"{path}: cannot read {what}: {error.strerror or error}; see to the file and its "
            "disk, then run the same command again"
        ) from error
