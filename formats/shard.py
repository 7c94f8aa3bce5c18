"""One shard of a bundle: a safetensors file with aligned tensors and no holes.

Rules: `formats/README.md`, section 3.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from uq.errors import BundleError
from uq.formats.decode import MAX_JSON, decode, parse_json, printable, shown
from uq.formats.manifest import ArrayRecord, TensorRecord
from uq.formats.spec import QuantTensor

MAX_HEADER = MAX_JSON
MAX_DIMS, MAX_SIZE = 8, 1 << 48  # of a shape
DATA_ALIGNMENT = 64
ARRAY_ALIGNMENT = 4
ITEM_BYTES = {"U8": 1, "F32": 4}
STORED_BYTES = ITEM_BYTES | {  # of files that are no shards of a bundle
    "BOOL": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "I16": 2, "U16": 2, "BF16": 2, "F16": 2,
    "I32": 4, "U32": 4, "I64": 8, "U64": 8, "F64": 8,
}  # fmt: skip


@dataclass(frozen=True)
class Stored:
    """A tensor as the header describes it; offsets are relative to the data."""

    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


def shard_file(index: int, count: int) -> str:
    """Name of shard `index`, which counts from 0: the embedding, then the layers."""
    return f"model-{index + 1:05d}-of-{count:05d}.safetensors"


def make_header(
    tensors: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str] | None = None
) -> bytes:
    """The bytes in front of the data.

    Args:
        tensors: name -> (dtype as safetensors calls it, shape), in the order of the data.
        metadata: about the file; a shard of a bundle has none.
    """
    entries: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    start = 0
    for name, (dtype, shape) in tensors.items():
        stop = start + math.prod(shape) * STORED_BYTES[dtype]
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": (start, stop)}
        start = stop
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % DATA_ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


class Shard:
    """An opened shard. Only the header is read; tensors are mapped from the file when asked for."""

    def __init__(self, path: Path) -> None:
        """Raises BundleError: the header is broken, or the data has holes or overlaps."""
        self.path = path
        self.start, self.tensors = _read_header(path)

    @cached_property
    def _data(self) -> NDArray[np.uint8]:
        return np.memmap(self.path, np.uint8, mode="r", offset=self.start)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(map(_nbytes, self.tensors.values()))

    def check(self, tensors: Mapping[str, TensorRecord], arrays: Mapping[str, ArrayRecord]) -> None:
        """Compare the header with what the manifest places in this file.

        Raises:
            BundleError: a tensor is missing, extra, misaligned, or of another dtype or shape.
        """
        records = {**tensors, **arrays}
        if extra := [name for name in self.tensors if name not in records]:
            raise BundleError(f"{self.path.name}: {printable(extra[0])} is not in the manifest")
        for name, tensor in tensors.items():
            self._check_tensor(name, "U8", tensor.stored_shape, tensor.order.alignment)
        for name, array in arrays.items():
            self._check_tensor(name, "F32", array.shape, ARRAY_ALIGNMENT)

    def _check_tensor(self, name: str, dtype: str, shape: tuple[int, ...], alignment: int) -> None:
        where = f"{self.path.name}: {name}"
        stored = self.tensors.get(name)
        if stored is None:
            raise BundleError(f"{where} is missing")
        if (stored.dtype, stored.shape) != (dtype, shape):
            raise BundleError(
                f"{where}: is {stored.dtype} {list(stored.shape)}, but the manifest asks for "
                f"{dtype} {list(shape)}"
            )
        if stored.data_offsets[0] % alignment:
            raise BundleError(
                f"{where}: offset {stored.data_offsets[0]} is no multiple of {alignment}"
            )

    def raw(self, name: str) -> NDArray[np.uint8]:
        """(blocks, bytes of a block) uint8, mapped read-only."""
        return self._bytes(name).reshape(self.tensors[name].shape)

    def quant(self, name: str, record: TensorRecord) -> QuantTensor:
        return record.order.untile(self._bytes(name), record.shape, record.spec)

    def rows(self, name: str, record: TensorRecord, start: int, stop: int) -> QuantTensor:
        height, (rows, cols) = record.order.row_block(record.spec), record.shape
        first, last = start // height, -(-stop // height)
        shape = min(last * height, rows) - first * height, cols
        blocks = self.raw(name)[first:last].reshape(-1)
        found = record.order.untile(blocks, shape, record.spec)
        return found.rows(start - first * height, stop - first * height)

    def array(self, name: str) -> NDArray[np.float32]:
        """A copy in memory."""
        shape = self.tensors[name].shape
        return self._bytes(name).view("<f4").astype(np.float32).reshape(shape)

    def _bytes(self, name: str) -> NDArray[np.uint8]:
        start, stop = self.tensors[name].data_offsets
        return self._data[start:stop]


def _read_header(path: Path) -> tuple[int, dict[str, Stored]]:
    """Start of the data, and the tensors in its order."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER):
            raise BundleError(
                f"{path.name}: header of {length} bytes in a file of {size}: cut short, or no shard"
            )
        text = file.read(length)
    if (8 + length) % DATA_ALIGNMENT or not text.startswith(b"{"):
        raise BundleError(f"{path.name}: the header is not padded to {DATA_ALIGNMENT} bytes")
    entries = parse_json(text, path.name)
    entries.pop("__metadata__", None)
    tensors = {
        name: decode(Stored, entry, f"{path.name}: {printable(name)}")
        for name, entry in entries.items()
    }
    in_order = sorted(tensors.items(), key=lambda item: item[1].data_offsets)
    _check_offsets(path.name, in_order, size - 8 - length)
    return 8 + length, dict(in_order)


def _check_offsets(file: str, tensors: Sequence[tuple[str, Stored]], data_bytes: int) -> None:
    """Every byte of the data belongs to exactly one tensor."""
    end = 0
    for name, stored in tensors:
        where = f"{file}: {printable(name)}"
        start, stop = stored.data_offsets
        if stored.dtype not in ITEM_BYTES:
            raise BundleError(f"{where}: dtype {shown(stored.dtype)} is not one of U8, F32")
        if len(stored.shape) > MAX_DIMS or any(size > MAX_SIZE for size in stored.shape):
            raise BundleError(f"{where}: shape {shown(stored.shape)} is out of range")
        if start != end:
            raise BundleError(f"{where}: begins at {start}, but the tensor before ends at {end}")
        if min(stored.shape, default=0) < 0 or stop - start != _nbytes(stored):
            raise BundleError(
                f"{where}: offsets {start}:{stop} do not hold {stored.dtype} {list(stored.shape)}"
            )
        end = stop
    if end != data_bytes:
        raise BundleError(f"{file}: the tensors take {end} bytes, but the data has {data_bytes}")


def _nbytes(stored: Stored) -> int:
    return math.prod(stored.shape) * ITEM_BYTES[stored.dtype]
