"""What a checkpoint holds, in hashes that are taken while it is read, in any order.

A file's own hash needs its bytes from the first to the last, and work on layers reads them in
another order. Here every block of rows has a SHA-256, a tensor the SHA-256 of its type, its shape
and its blocks', and a file that of its tensors'. What lies between tensors and what the model does
not need counts for nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256

import numpy as np
from numpy.typing import NDArray

from uq.formats.checkpoint.tensors import TensorInfo, raw_rows

BLOCK = 1 << 20  # numbers, about
HEIGHT = 16  # of whose multiple a block has rows: those of every layout's row block


def blocks(info: TensorInfo) -> Iterator[tuple[int, int]]:
    """First row of each block, and the first behind it."""
    rows, numbers = info.shape[0], int(np.prod(info.shape[1:], dtype=np.int64))
    step = max(1, BLOCK // (max(1, numbers) * HEIGHT)) * HEIGHT
    return ((start, min(start + step, rows)) for start in range(0, rows, step))


def block_digest(raw: NDArray[np.uint8]) -> bytes:
    """Of a block's bytes as they are stored, C-contiguous."""
    return sha256(raw.data).digest()


def tensor_content(info: TensorInfo, digests: Iterable[bytes]) -> str:
    """SHA-256 in hex, from the digests of all blocks in order."""
    head = f"{info.dtype} {'x'.join(map(str, info.shape))}\n".encode()
    return sha256(head + b"".join(digests)).hexdigest()


def read_contents(tensors: Mapping[str, TensorInfo], pool: ThreadPoolExecutor) -> dict[str, str]:
    """`tensor_content` of tensors by name, read for it alone; block by block, in threads.

    Raises:
        CheckpointError, DeviceError, HubError: as reading does.
    """

    def content(info: TensorInfo) -> str:
        def digest(rows: tuple[int, int]) -> bytes:
            return block_digest(raw_rows(info, *rows))

        return tensor_content(info, pool.map(digest, blocks(info)))

    return {name: content(info) for name, info in tensors.items()}


def file_contents(tensors: Mapping[str, TensorInfo], contents: Mapping[str, str]) -> dict[str, str]:
    """SHA-256 of each file's tensors, from theirs: file name -> hex.

    Args:
        contents: `tensor_content` of every tensor of `tensors`.
    """
    lines: dict[str, list[str]] = {info.file.name: [] for info in tensors.values()}
    for name in sorted(tensors):
        lines[tensors[name].file.name].append(f"{name} {contents[name]}\n")
    return {file: sha256("".join(found).encode()).hexdigest() for file, found in lines.items()}
