"""Headers of safetensors files: which tensors lie where. The weights are not touched."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from uq.errors import CheckpointError
from uq.formats.checkpoint.tensors import TensorInfo

ITEM_BYTES = {"bf16": 2, "f16": 2, "f32": 4}
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MAX_HEADER = 100_000_000


def folder_tensors(folder: Path) -> dict[str, TensorInfo]:
    """All tensors of a folder, by their name in the files.

    Raises:
        CheckpointError: no weights, a shard of the index is missing, or a file is broken.
    """
    if (folder / INDEX).is_file():
        return _indexed_tensors(folder)
    if (folder / SINGLE).is_file():
        return file_tensors(folder / SINGLE)
    raise CheckpointError(f"{folder}: has no weights; expected {SINGLE} or {INDEX}")


def file_tensors(path: Path) -> dict[str, TensorInfo]:
    """Tensors of one file.

    Raises:
        CheckpointError: the header is broken, or it and the size of the file disagree.
    """
    header, data_start = _header(path)
    size = path.stat().st_size
    tensors = {
        name: _tensor(path, name, entry, data_start)
        for name, entry in header.items()
        if name != "__metadata__"
    }
    end = max((t.offset + t.nbytes for t in tensors.values()), default=data_start)
    if end > size:
        last = max(tensors.values(), key=lambda t: t.offset)
        raise CheckpointError(
            f"{path.name}: {size} bytes, but {last.name} ends at {end}: the file is cut short; "
            "copy or download it again"
        )
    return tensors


def index_shards(path: Path) -> dict[str, str]:
    """Tensor name -> file name, as an index file lists them.

    Raises:
        CheckpointError: the index is not JSON, or names a file outside of its folder.
    """
    try:
        shards = json.loads(path.read_bytes())["weight_map"]
        items = {str(name): str(file) for name, file in shards.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path.name}: not a safetensors index: {error!r}") from error
    for file in items.values():
        if Path(file).name != file:
            raise CheckpointError(f"{path.name}: shard {file!r} is not a plain file name")
    return items


def _indexed_tensors(folder: Path) -> dict[str, TensorInfo]:
    shards = index_shards(folder / INDEX)
    tensors: dict[str, TensorInfo] = {}
    for file in sorted(set(shards.values())):
        if not (folder / file).is_file():
            raise CheckpointError(f"{folder}: shard {file} is missing, but {INDEX} names it")
        tensors |= file_tensors(folder / file)
    if missing := sorted(set(shards) - set(tensors)):
        raise CheckpointError(
            f"{shards[missing[0]]}: {missing[0]} is missing, but {INDEX} says it is there "
            f"({len(missing)} such tensors)"
        )
    return tensors


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """JSON header and the offset of the data behind it."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER):
            raise CheckpointError(
                f"{path.name}: header of {length} bytes in a file of {size}: not a safetensors "
                "file, or cut short"
            )
        text = file.read(length)
    try:
        header = json.loads(text)
    except ValueError as error:
        raise CheckpointError(f"{path.name}: header is not JSON: {error}") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path.name}: header is not a JSON object")
    return header, 8 + length


def _tensor(path: Path, name: str, entry: Any, data_start: int) -> TensorInfo:
    try:
        dtype = str(entry["dtype"]).lower()
        shape = tuple(int(size) for size in entry["shape"])
        start, stop = (int(offset) for offset in entry["data_offsets"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path.name}: {name}: broken header entry: {error!r}") from error
    nbytes = stop - start
    if start < 0 or nbytes < 0 or min(shape, default=0) < 0:
        raise CheckpointError(
            f"{path.name}: {name}: data offsets {start}:{stop}, shape {shape}: out of range"
        )
    if dtype in ITEM_BYTES and nbytes != math.prod(shape) * ITEM_BYTES[dtype]:
        raise CheckpointError(
            f"{path.name}: {name}: {nbytes} bytes, but shape {shape} of {dtype} takes "
            f"{math.prod(shape) * ITEM_BYTES[dtype]}"
        )
    return TensorInfo(name, path, data_start + start, shape, dtype, nbytes)
