"""Header of a GGUF file: metadata and tensor table.

Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The `gguf` package supplies the
constants and dequantizes; its reader makes several array objects for each of the 262,144 strings
of Gemma's vocabulary, which takes seconds, so the header is parsed here.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from uq.errors import CheckpointError
from uq.formats.checkpoint.tensors import TensorInfo
from uq.formats.checkpoint.weight_file import LocalFile
from uq.formats.decode import printable

MAGIC = b"GGUF"
VERSIONS = (2, 3)
STRING, ARRAY = 8, 9
SCALARS: dict[int, np.dtype[Any]] = {
    0: np.dtype("u1"),
    1: np.dtype("i1"),
    2: np.dtype("<u2"),
    3: np.dtype("<i2"),
    4: np.dtype("<u4"),
    5: np.dtype("<i4"),
    6: np.dtype("<f4"),
    7: np.dtype("?"),
    10: np.dtype("<u8"),
    11: np.dtype("<i8"),
    12: np.dtype("<f8"),
}
MAX_DIMS = 4
MAX_ITEMS = 1 << 22  # of an array; a vocabulary has 262,144
MAX_ENTRIES = 1 << 16  # keys, or tensors
U32 = struct.Struct("<I")
U64 = struct.Struct("<Q")


@dataclass(frozen=True)
class GgufFile:
    """A parsed header.

    Attributes:
        metadata: scalars as Python numbers, strings as str, arrays of numbers as NumPy arrays,
            arrays of strings as lists of bytes (decoding 262,144 of them is left to the caller).
        tensors: by name in the file.
    """

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]


def read_gguf(path: Path) -> GgufFile:
    """Parse the header of a GGUF file.

    Raises:
        CheckpointError: not a GGUF file, an unknown version or type, or the file is cut short.
    """
    size = path.stat().st_size
    if size < 24:
        raise CheckpointError(f"{path.name}: {size} bytes: not a GGUF file")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        try:
            return _parse(path, _Cursor(data), size)
        except (struct.error, ValueError) as error:
            raise CheckpointError(
                f"{path.name}: broken or cut short within the header: {printable(str(error))}"
            ) from error


class _Cursor:
    """Reads values one after another."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.at = 0

    def u32(self) -> int:
        (value,) = U32.unpack_from(self.data, self.at)
        self.at += 4
        return int(value)

    def u64(self) -> int:
        (value,) = U64.unpack_from(self.data, self.at)
        self.at += 8
        return int(value)

    def count(self, most: int) -> int:
        """A number of things, none of which is smaller than a byte."""
        value = self.u64()
        if value > min(most, len(self.data)):
            raise ValueError(f"{value} at offset {self.at - 8} is more than can be there")
        return value

    def take(self, length: int) -> bytes:
        stop = self.at + length
        if stop > len(self.data):
            raise ValueError(f"{length} bytes at offset {self.at} end behind the file")
        taken = self.data[self.at : stop]
        self.at = stop
        return taken

    def string(self) -> str:
        return self.take(self.u64()).decode()

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.string()
        if kind == ARRAY:
            return self.array(self.u32(), self.count(MAX_ITEMS))
        return self.numbers(kind, 1)[0].item()

    def array(self, kind: int, count: int) -> Any:
        if kind == STRING:
            return self.strings(count)
        return self.numbers(kind, count)

    def numbers(self, kind: int, count: int) -> Any:
        if kind not in SCALARS:
            raise ValueError(f"unknown value type {kind}")
        dtype = SCALARS[kind]
        return np.frombuffer(self.take(count * dtype.itemsize), dtype)

    def strings(self, count: int) -> list[bytes]:
        data, at, end, size = self.data, self.at, len(self.data), U64.unpack_from
        found = []
        for _ in range(count):
            start = at + 8
            at = start + size(data, at)[0]
            if at > end:
                raise ValueError("a list of strings ends behind the file")
            found.append(data[start:at])
        self.at = at
        return found


def _parse(path: Path, cursor: _Cursor, size: int) -> GgufFile:
    magic, version = cursor.take(4), cursor.u32()
    if magic != MAGIC:
        raise CheckpointError(f"{path.name}: starts with {magic!r}, not {MAGIC!r}: no GGUF file")
    if version not in VERSIONS:
        raise CheckpointError(
            f"{path.name}: GGUF version {version} is not supported (a big-endian file?); "
            f"supported are: {', '.join(map(str, VERSIONS))}"
        )
    tensor_count, key_count = cursor.count(MAX_ENTRIES), cursor.count(MAX_ENTRIES)
    metadata: dict[str, Any] = {}
    for _ in range(key_count):
        key = cursor.string()
        metadata[key] = cursor.value(cursor.u32())
    table = [_entry(cursor) for _ in range(tensor_count)]
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 1:
        raise ValueError(f"general.alignment is {alignment!r:.40}")
    data_start = -(-cursor.at // alignment) * alignment
    tensors = {
        name: _tensor(path, size, data_start + offset, name, shape, kind)
        for name, shape, kind, offset in table
    }
    return GgufFile(path, metadata, tensors)


def _entry(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    """Name, shape (rows first), type and offset within the data."""
    name, dims = cursor.string(), cursor.u32()
    if dims > MAX_DIMS:
        raise ValueError(f"{name} has {dims} dimensions")
    shape = tuple(cursor.u64() for _ in range(dims))[::-1]
    return name, shape, cursor.u32(), cursor.u64()


def _tensor(
    path: Path, size: int, offset: int, name: str, shape: tuple[int, ...], kind: int
) -> TensorInfo:
    try:
        dtype = GGMLQuantizationType(kind)
    except ValueError as error:
        raise CheckpointError(
            f"{path.name}: {printable(name)}: unknown tensor type {kind}"
        ) from error
    block, block_bytes = GGML_QUANT_SIZES[dtype]
    if not shape or shape[-1] % block:
        raise CheckpointError(
            f"{path.name}: {printable(name)}: rows of shape {shape} do not divide by blocks of "
            f"{block} ({dtype.name})"
        )
    nbytes = math.prod(shape) // block * block_bytes
    if offset + nbytes > size:
        raise CheckpointError(
            f"{path.name}: {size} bytes, but {printable(name)} ends at {offset + nbytes}: the file "
            "is cut short; copy or download it again"
        )
    return TensorInfo(name, LocalFile(path), offset, shape, dtype.name.lower(), nbytes)
