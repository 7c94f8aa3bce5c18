"""Headers of safetensors files: which tensors lie where. The weights are not touched."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from uq.errors import BundleError, CheckpointError
from uq.formats.checkpoint.small_file import read_small
from uq.formats.checkpoint.tensors import TensorInfo
from uq.formats.checkpoint.weight_file import LocalFile, WeightFile
from uq.formats.decode import MAX_JSON, decode, parse_json, printable

ITEM_BYTES = {"bf16": 2, "f16": 2, "f32": 4}
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MAX_HEADER = MAX_JSON
MAX_DIMS, MAX_SIZE = 8, 1 << 48  # of a shape


@dataclass(frozen=True)
class Entry:
    """A tensor as a header describes it; offsets are relative to the data."""

    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


def folder_tensors(folder: Path) -> dict[str, TensorInfo]:
    """All tensors of a folder, by their name in the files.

    Raises:
        CheckpointError: no weights, a shard of the index is missing, or a file is broken.
    """
    files = [LocalFile(folder / name) for name in weight_names(folder)]
    for file in files:
        if not file.path.is_file() and listed_shards(folder):
            raise CheckpointError(f"{folder}: shard {file.name} is missing, but {INDEX} names it")
        if not file.path.is_file():
            raise CheckpointError(f"{folder}: has no weights; expected {SINGLE} or {INDEX}")
    return stored_tensors(folder, files)


def weight_names(folder: Path) -> list[str]:
    """The weight files that belong to a folder, by its index where it has one.

    Raises:
        CheckpointError: the index is broken.
    """
    return sorted(set(listed_shards(folder).values())) or [SINGLE]


def listed_shards(folder: Path) -> dict[str, str]:
    """Tensor name -> file name by the folder's index; empty where it has none that counts.

    A single file goes before an index that does not name it, as in transformers: who saves a merged
    model into the folder of its base leaves that one's index behind.

    Raises:
        CheckpointError: the index is broken.
    """
    index = folder / INDEX
    shards = index_shards(index) if index.is_file() else {}
    stale = (folder / SINGLE).is_file() and SINGLE not in shards.values()
    return {} if stale else shards


def stored_tensors(folder: Path, files: Iterable[WeightFile]) -> dict[str, TensorInfo]:
    """All tensors of `files`, which need not lie in the folder that has their index.

    Raises:
        CheckpointError: a file is broken, or lacks a tensor that the index names.
    """
    tensors = {name: info for file in files for name, info in file_tensors(file).items()}
    shards = listed_shards(folder)
    if missing := sorted(set(shards) - set(tensors)):
        raise CheckpointError(
            f"{shards[missing[0]]}: {missing[0]} is missing, but {INDEX} says it is there "
            f"({len(missing)} such tensors)"
        )
    return tensors


def file_tensors(file: WeightFile) -> dict[str, TensorInfo]:
    """Tensors of one file.

    Raises:
        CheckpointError: the header is broken, or it and the size of the file disagree.
    """
    header, data_start = _header(file)
    size = file.size
    tensors = {
        name: _tensor(file, name, entry, data_start)
        for name, entry in header.items()
        if name != "__metadata__"
    }
    _check_places(file, sorted(tensors.values(), key=lambda tensor: tensor.offset), size)
    return tensors


def file_metadata(file: WeightFile) -> dict[str, str]:
    """The `__metadata__` of a file.

    Raises:
        CheckpointError: the header is broken.
    """
    found = _header(file)[0].get("__metadata__", {})
    if not isinstance(found, dict) or not all(isinstance(v, str) for v in found.values()):
        raise CheckpointError(f"{file.name}: header: __metadata__ is no object of strings")
    return found


def _check_places(file: WeightFile, tensors: Sequence[TensorInfo], size: int) -> None:
    """In the order of the file, no two tensors share a byte and the last ends within it."""
    for before, tensor in pairwise(tensors):
        if before.offset + before.nbytes > tensor.offset:
            raise CheckpointError(
                f"{tensor.where}: begins at {tensor.offset}, within {printable(before.name)}"
            )
    if tensors and (end := tensors[-1].offset + tensors[-1].nbytes) > size:
        raise CheckpointError(
            f"{file.name}: {size} bytes, but {printable(tensors[-1].name)} ends at {end}: the file "
            "is cut short; copy or download it again"
        )


def index_shards(path: Path) -> dict[str, str]:
    """Tensor name -> file name, as an index file lists them.

    Raises:
        CheckpointError: the index is not JSON, or names a file outside of its folder.
    """
    try:
        shards = parse_json(read_small(path), path.name, CheckpointError)["weight_map"]
        items = {str(name): str(file) for name, file in shards.items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path.name}: not a safetensors index: it has no weight_map of names and files"
        ) from error
    for file in items.values():
        if Path(file).name != file or "\0" in file:
            raise CheckpointError(f"{path.name}: shard {file[:99]!r} is not a plain file name")
    return items


def _header(file: WeightFile) -> tuple[dict[str, Any], int]:
    """JSON header and the offset of the data behind it."""
    size = file.size
    length = int.from_bytes(file.read(0, 8).tobytes(), "little") if size >= 8 else 0
    if size < 8 or length > min(size - 8, MAX_HEADER):
        raise CheckpointError(
            f"{file.name}: header of {length} bytes in a file of {size}: not a safetensors "
            "file, or cut short"
        )
    text = file.read(8, length).tobytes() if length else b""
    header = parse_json(text, f"{file.name}: header", CheckpointError)
    if not isinstance(header, dict):
        raise CheckpointError(f"{file.name}: header is not a JSON object")
    return header, 8 + length


def _tensor(file: WeightFile, name: str, entry: Any, data_start: int) -> TensorInfo:
    try:
        stored = decode(Entry, entry, name)
    except BundleError as error:
        raise CheckpointError(f"{file.name}: broken header entry: {error}") from error
    dtype, shape, (start, stop) = stored.dtype.lower(), stored.shape, stored.data_offsets
    nbytes = stop - start
    if (
        start < 0
        or nbytes < 0
        or len(shape) > MAX_DIMS
        or not all(0 <= n <= MAX_SIZE for n in shape)
    ):
        raise CheckpointError(
            f"{file.name}: {printable(name)}: data offsets {start}:{stop}, shape "
            f"{shape[: MAX_DIMS + 1]}: out of range"
        )
    if dtype in ITEM_BYTES and nbytes != math.prod(shape) * ITEM_BYTES[dtype]:
        raise CheckpointError(
            f"{file.name}: {printable(name)}: {nbytes} bytes, but shape {shape} of {dtype} takes "
            f"{math.prod(shape) * ITEM_BYTES[dtype]}"
        )
    return TensorInfo(name, file, data_start + start, shape, dtype, nbytes)
