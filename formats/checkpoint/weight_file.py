"""A file of weights, on this disk or elsewhere: its size, its hash, any part of its bytes."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from uq.errors import CheckpointError

HASH_BLOCK = 1 << 24


class WeightFile(Protocol):
    """Where tensors lie.

    Attributes:
        version: changes when the content does.
    """

    @property
    def name(self) -> str: ...
    @property
    def size(self) -> int: ...
    @property
    def version(self) -> str: ...

    def read(self, offset: int, nbytes: int) -> NDArray[np.uint8]:
        """Bytes `offset:offset + nbytes`, read-only.

        Raises:
            CheckpointError: the file is gone, or was cut after it was opened.
            HubError: the network, for a file on the Hub.
        """
        ...

    def sha256(self) -> str:
        """Of the whole file, in hex."""
        ...


@dataclass(frozen=True)
class LocalFile:
    """A file on this disk.

    Its bytes are memory-mapped for as long as a caller holds them only, so that pages of a large
    file do not count as memory of the process afterwards.
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
        return str(self.path.stat().st_mtime_ns)

    def read(self, offset: int, nbytes: int) -> NDArray[np.uint8]:
        try:
            return np.memmap(self.path, np.uint8, "r", offset, (nbytes,))
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{self.name}: cannot read {nbytes} bytes at {offset}: {error}"
            ) from error

    def sha256(self) -> str:
        """In large steps, which seldom wait for the interpreter's lock."""
        digest, block = hashlib.sha256(), bytearray(HASH_BLOCK)
        with self.path.open("rb", buffering=0) as file:
            while count := file.readinto(block):
                digest.update(memoryview(block)[:count])
        return digest.hexdigest()
