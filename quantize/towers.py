"""Vision and audio towers on their way into a bundle: as they are, or in INT8."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

from uq.errors import CheckpointError, UsageError
from uq.formats.checkpoint import Checkpoint
from uq.formats.checkpoint.checkpoint import Contents
from uq.formats.checkpoint.content import block_digest, tensor_content
from uq.formats.checkpoint.opening import PROCESSOR
from uq.formats.checkpoint.tensors import TensorInfo, as_float32
from uq.formats.entries import StoredEntry
from uq.formats.shard import STORED_BYTES
from uq.formats.towers import (
    SCALE_BYTES,
    is_quantizable,
    raw_pieces,
    stored_bytes,
    to_int8,
    with_rows,
)

MODES = ("keep", "int8", "drop")


def require_towers(checkpoint: Checkpoint, mode: str) -> None:
    """Refuse an unknown mode, and tensors of a type that no safetensors file has.

    Raises:
        UsageError, CheckpointError: says which.
    """
    if mode not in MODES:
        raise UsageError(f"towers {mode!r} is not known; use {', '.join(MODES)}")
    for info in checkpoint.towers.values():
        if info.dtype.upper() not in STORED_BYTES:
            raise CheckpointError(
                f"{info.where}: dtype {info.dtype[:20]!r} is not known; use --towers drop"
            )


def tower_entries(checkpoint: Checkpoint, mode: str, contents: Contents) -> list[StoredEntry]:
    """The tensors of the towers' file.

    Args:
        contents: the hash of each tensor of the source is entered here as it is written.
    """
    return [
        _int8(info, name, contents)
        if mode == "int8" and is_quantizable(info)
        else StoredEntry(name, info.dtype.upper(), info.shape, _hashed(info, name, contents))
        for name, info in checkpoint.towers.items()
    ]


def int8_types(towers: Mapping[str, TensorInfo], mode: str) -> dict[str, str]:
    """Metadata of the towers' file: what each INT8 matrix is in the source."""
    chosen = {name: info for name, info in towers.items() if is_quantizable(info)}
    return {name: info.dtype.upper() for name, info in chosen.items()} if mode == "int8" else {}


def carried(checkpoint: Checkpoint, *, towers: bool) -> dict[str, bytes]:
    """The files beside the weights; those of a processor go with the towers.

    Raises:
        CheckpointError: no tokenizer is among them, or one that cannot be used.
    """
    checkpoint.tokenizer()
    assets = checkpoint.assets()
    return {name: data for name, data in assets.items() if towers or name not in PROCESSOR}


def missing_processor(assets: Mapping[str, bytes]) -> str | None:
    """What to tell the user of towers whose inputs nobody can prepare."""
    if any(name in assets for name in PROCESSOR):
        return None
    return (
        f"towers: kept, but the source has no {PROCESSOR[0]}: to prepare images or sound, copy it "
        "from the original model"
    )


def describe(towers: Mapping[str, TensorInfo], mode: str) -> str:
    """`12 tensors, 834,567 bytes`."""
    return f"{len(towers)} tensors, {stored_bytes(towers, mode):,} bytes"


def _int8(info: TensorInfo, name: str, contents: Contents) -> StoredEntry:
    rows, cols = info.shape
    pieces = _hashed(info, name, contents)

    def blocks() -> Iterator[NDArray[np.uint8]]:
        start = 0
        for raw in pieces:
            yield to_int8(as_float32(info, raw, start))
            start += len(raw)

    return StoredEntry(name, "U8", (rows, cols + SCALE_BYTES), blocks())


def _hashed(info: TensorInfo, name: str, contents: Contents) -> Iterator[NDArray[np.uint8]]:
    digests = []
    for raw in raw_pieces(info):
        digests.append(block_digest(raw))
        yield raw
    contents[name] = tensor_content(with_rows(info), digests)
