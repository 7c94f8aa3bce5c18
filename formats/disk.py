"""Files that are hashed, synced and put in place in one step, and what a full disk says."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from io import FileIO
from pathlib import Path

from uq.errors import DeviceError

SYNC_STEP = 32 << 20  # bytes written between two early syncs
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def require_free(path: Path, nbytes: int, remedy: str = "") -> None:
    """Refuse to begin when the disk of `path`, which need not exist yet, is too full.

    Args:
        remedy: what would need less.

    Raises:
        DeviceError: says what is needed and what is free.
    """
    folder, free = _free(path)
    if free < nbytes:
        raise DeviceError(
            f"{path}: {nbytes:,} bytes needed, {free:,} free in {folder}; free some space or "
            f"choose another disk{remedy and f', or {remedy}'}"
        )


def write_file(path: Path, chunks: Iterable[bytes | memoryview], nbytes: int) -> str:
    """Write and sync a file in one pass; hashing and the disk work beside the writing.

    Args:
        chunks: C-contiguous buffers.
        nbytes: what they add up to; for the message when the disk is full.

    Returns:
        The SHA-256 of the content, in hex.

    Raises:
        DeviceError: the disk is full or broken. No file is left behind by any exception.
    """
    digest = hashlib.sha256()
    try:
        with disk_errors(path, nbytes):
            file = path.open("wb", buffering=0)  # a buffer would fail again when closed
        with file, ThreadPoolExecutor(2) as pool:
            early = _EarlySync(file.fileno(), pool)
            for chunk in chunks:
                hashed = pool.submit(digest.update, chunk)  # without the interpreter's lock
                with disk_errors(path, nbytes):
                    _write_all(file, chunk)
                    early.wrote(memoryview(chunk).nbytes)
                hashed.result()
            with disk_errors(path, nbytes):
                early.settle()
                os.fsync(file.fileno())
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    return digest.hexdigest()


def free_bytes(path: Path) -> int:
    """Room on the disk of `path`, which need not exist yet."""
    return _free(path)[1]


class _EarlySync:
    """Keeps the disk at work while a file is written, so that the sync at its end has little left.

    One sync at a time; what it meets is raised by the calls that follow.
    """

    def __init__(self, descriptor: int, pool: ThreadPoolExecutor) -> None:
        self._descriptor = descriptor
        self._pool = pool
        self._fresh = 0
        self._running: Future[None] | None = None

    def wrote(self, nbytes: int) -> None:
        self._fresh += nbytes
        if self._fresh >= SYNC_STEP and (self._running is None or self._running.done()):
            self.settle()
            self._running = self._pool.submit(os.fdatasync, self._descriptor)
            self._fresh = 0

    def settle(self) -> None:
        """Raises OSError: the disk is full or broken."""
        if self._running is not None:
            self._running.result()


def _write_all(file: FileIO, chunk: bytes | memoryview) -> None:
    """The system may write less than it is given."""
    rest = memoryview(chunk).cast("B")
    while rest:
        rest = rest[file.write(rest) :]


def replace_file(path: Path, data: bytes) -> None:
    """Write a small file so that `path` holds the old or the new content, never a part."""
    fresh = path.with_name(path.name + ".new")
    write_file(fresh, [data], len(data))
    with disk_errors(path, len(data)):
        fresh.replace(path)
        sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def disk_errors(path: Path, nbytes: int) -> Iterator[None]:
    """Turn an `OSError` of writing `nbytes` to `path` into a `DeviceError`."""
    try:
        yield
    except OSError as error:
        reason = f"{path}: {error.strerror or error}"
        if error.errno not in NO_ROOM:
            raise DeviceError(reason) from error
        written = path.stat().st_size if path.is_file() else 0
        free = _free(path.parent)[1] + written
        limit = ", in files of limited size (see ulimit -f)" if error.errno == errno.EFBIG else ""
        raise DeviceError(
            f"{reason}: {nbytes:,} bytes needed, {free:,} free{limit}; make room and run the same "
            "command again"
        ) from error


def _free(path: Path) -> tuple[Path, int]:
    """The nearest folder of `path` that exists, and the bytes free on its disk."""
    folder = path.absolute()
    while not folder.is_dir():
        folder = folder.parent
    return folder, shutil.disk_usage(folder).free


def hash_files(files: Mapping[str, Path]) -> dict[str, str]:
    """SHA-256 of each file, in hex; in parallel: hashing releases the interpreter's lock."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(files, pool.map(_hash_file, files.values()), strict=True))


def _hash_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
