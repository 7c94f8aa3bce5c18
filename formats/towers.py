"""What of a multimodal checkpoint is not its text model: vision and audio towers and projectors.

They lie in a safetensors file of the bundle, under the names and in the types that the source has.
A matrix may be stored as INT8 instead, row by row: `cols` codes, then the row's scale as a float32.
Its type in the source is in the metadata of the file. `formats/README.md`, section 3.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from uq.errors import BundleError
from uq.formats.checkpoint.content import blocks
from uq.formats.checkpoint.safetensors_file import file_metadata, file_tensors
from uq.formats.checkpoint.tensors import DECODERS, TensorInfo, raw_rows
from uq.formats.checkpoint.weight_file import LocalFile

SCALE_BYTES = 4
Bytes = NDArray[np.uint8]
Values = NDArray[np.float32]


@dataclass(frozen=True)
class TowerTensor:
    """One tensor.

    Attributes:
        name, dtype, shape: as in the source; `bf16`, `f32`, `i64`...
        info: where it lies in the bundle.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    info: TensorInfo

    @property
    def is_int8(self) -> bool:
        return self.info.shape != self.shape

    @property
    def nbytes(self) -> int:
        """In the bundle."""
        return self.info.nbytes

    def pieces(self) -> Iterator[Bytes]:
        """Consecutive rows as the bundle stores them."""
        return raw_pieces(self.info)

    def values(self) -> Iterator[Values]:
        """Consecutive rows of an INT8 matrix."""
        return map(from_int8, self.pieces())


def open_towers(path: Path) -> dict[str, TowerTensor]:
    """The tensors of a file, by name.

    Raises:
        CheckpointError: the file is broken.
        BundleError: its metadata contradict it.
    """
    file = LocalFile(path)
    int8 = file_metadata(file)
    tensors = {
        name: _tensor(info, int8.get(name), path) for name, info in file_tensors(file).items()
    }
    if unknown := sorted(set(int8) - set(tensors) - {"format"}):
        raise BundleError(f"{path.name}: metadata name {unknown[0]!r:.99}, which is not there")
    return tensors


def _tensor(info: TensorInfo, dtype: str | None, path: Path) -> TowerTensor:
    if dtype is None:
        return TowerTensor(info.name, info.dtype, info.shape, info)
    rows, width = info.shape if len(info.shape) == 2 else (0, 0)
    if info.dtype != "u8" or dtype.lower() not in DECODERS or width <= SCALE_BYTES:
        raise BundleError(f"{path.name}: {info.where}: is no INT8 matrix of {dtype!r:.20}")
    return TowerTensor(info.name, dtype.lower(), (rows, width - SCALE_BYTES), info)


def raw_pieces(info: TensorInfo) -> Iterator[Bytes]:
    """All bytes of a tensor, in blocks of whole rows; a number is one row."""
    info = with_rows(info)
    for start, stop in blocks(info):
        yield raw_rows(info, start, stop)


def with_rows(info: TensorInfo) -> TensorInfo:
    """The same tensor; a single number has one row."""
    return replace(info, shape=info.shape or (1,))


def to_int8(values: Values) -> Bytes:
    """(rows, cols) float32 -> (rows, cols + 4): the codes of each row, then its scale.

    `scale = max |value| / 127`; codes are rounded to nearest, ties to even.
    """
    scales = np.abs(values).max(axis=1, keepdims=True) / np.float32(127)
    codes = np.rint(values / np.where(scales > 0, scales, np.float32(1))).astype(np.int8)
    return np.concatenate([codes.view(np.uint8), scales.astype("<f4").view(np.uint8)], axis=1)


def from_int8(rows: Bytes) -> Values:
    """Inverse of `to_int8`, but for the rounding."""
    codes, scales = rows[:, :-SCALE_BYTES].view(np.int8), rows[:, -SCALE_BYTES:]
    values: Values = codes.astype(np.float32) * np.ascontiguousarray(scales).view("<f4")
    return values


def is_quantizable(info: TensorInfo) -> bool:
    """Whether it may be INT8: a matrix of floating-point numbers."""
    return len(info.shape) == 2 and info.dtype in DECODERS and info.nbytes > 0


def stored_bytes(towers: Mapping[str, TensorInfo], mode: str) -> int:
    """Bytes of the towers in a bundle."""
    if mode == "drop":
        return 0
    return sum(
        info.shape[0] * (info.shape[1] + SCALE_BYTES)
        if mode == "int8" and is_quantizable(info)
        else info.nbytes
        for info in towers.values()
    )
