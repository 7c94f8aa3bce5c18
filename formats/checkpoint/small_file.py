"""Files beside the weights: read whole, so no larger than any real one."""

from __future__ import annotations

from pathlib import Path

from uq.errors import CheckpointError
from uq.formats.checkpoint.weight_file import disk_reads
from uq.formats.decode import MAX_JSON


def read_small(path: Path, most: int = MAX_JSON) -> bytes:
    """Content of a file of at most `most` bytes.

    Raises:
        CheckpointError: it is gone, larger, or no regular file.
        DeviceError: the disk failed.
    """
    with disk_reads(path, "it"):
        size = path.stat().st_size
        if not path.is_file():
            raise CheckpointError(f"{path}: is not a regular file")
        if size > most:
            raise CheckpointError(
                f"{path}: {size} bytes, more than {most}; no model has such a file"
            )
        return path.read_bytes()
