"""What a shard is written from: quantized tensors in pieces, and plain arrays."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from math import prod

import numpy as np
from numpy.typing import NDArray

from uq.formats.layouts import LAYOUTS
from uq.formats.manifest import ArrayRecord, TensorRecord
from uq.formats.shard import ARRAY_ALIGNMENT, STORED_BYTES
from uq.formats.spec import QuantTensor, Spec


@dataclass(frozen=True)
class TiledRows:
    """Consecutive rows of a quantized tensor as a layout stores them.

    Attributes:
        data: what `Layout.tile` gives for them.
    """

    shape: tuple[int, int]
    spec: Spec
    data: NDArray[np.uint8]

    @classmethod
    def of(cls, tensor: QuantTensor, layout: str) -> TiledRows:
        return cls(tensor.shape, tensor.spec, LAYOUTS[layout].tile(tensor))


@dataclass(frozen=True)
class QuantEntry:
    """A quantized tensor to be written in pieces.

    Attributes:
        shape: (out, in).
        blocks: consecutive rows; every piece but the last has a multiple of the layout's row block.
            Those that are tiled already have the entry's layout.
        relative_error: the number, or a function that is asked for it behind the last block.
        fallback: why a part of the tensor was not quantized as planned; None if all was. Or a
            function, as above.
    """

    name: str
    shape: tuple[int, int]
    spec: Spec
    layout: str
    method: str
    blocks: Iterable[QuantTensor | TiledRows]
    relative_error: float | Callable[[], float] | None = None
    fallback: str | Callable[[], str | None] | None = None

    dtype = "U8"

    @property
    def alignment(self) -> int:
        return LAYOUTS[self.layout].alignment

    @property
    def stored_shape(self) -> tuple[int, ...]:
        layout, (rows, cols) = LAYOUTS[self.layout], self.shape
        return layout.block_count(rows, self.spec), layout.block(cols, self.spec).itemsize

    @property
    def nbytes(self) -> int:
        return LAYOUTS[self.layout].nbytes(*self.shape, self.spec)

    def chunks(self) -> Iterator[memoryview]:
        height = LAYOUTS[self.layout].row_block(self.spec)
        rows = 0
        for block in self.blocks:
            if block.spec != self.spec or block.shape[1] != self.shape[1] or rows % height:
                raise ValueError(f"{self.name}: piece {block.shape} {block.spec} behind row {rows}")
            rows += block.shape[0]
            tiled = block if isinstance(block, TiledRows) else TiledRows.of(block, self.layout)
            yield tiled.data.data
        if rows != self.shape[0]:
            raise ValueError(f"{self.name}: {rows} rows, not {self.shape[0]}")

    def record(self, file: str) -> TensorRecord:
        error = self.relative_error() if callable(self.relative_error) else self.relative_error
        return TensorRecord(
            shape=self.shape,
            bits=self.spec.bits,
            group=self.spec.group,
            layout=self.layout,
            method=self.method,
            relative_error=None if error is None else float(error),
            file=file,
            zero_point=self.spec.zero_point,
            scale_bits=self.spec.scale_bits,
            fallback=self.fallback() if callable(self.fallback) else self.fallback,
        )


@dataclass(frozen=True)
class ArrayEntry:
    """A plain float32 array."""

    name: str
    array: NDArray[np.float32]

    dtype = "F32"
    alignment = ARRAY_ALIGNMENT

    @property
    def stored_shape(self) -> tuple[int, ...]:
        return self.array.shape

    @property
    def nbytes(self) -> int:
        return self.array.size * 4

    def chunks(self) -> Iterator[memoryview]:
        yield np.ascontiguousarray(self.array, "<f4").data

    def record(self, file: str) -> ArrayRecord:
        return ArrayRecord(self.array.shape, "float32", file)


@dataclass(frozen=True)
class StoredEntry:
    """A tensor that is stored as it comes.

    Attributes:
        dtype: as safetensors calls it.
        pieces: its C-contiguous bytes, to be taken once.
    """

    name: str
    dtype: str
    stored_shape: tuple[int, ...]
    pieces: Iterable[NDArray[np.uint8]]

    @property
    def alignment(self) -> int:
        return STORED_BYTES[self.dtype]

    @property
    def nbytes(self) -> int:
        return prod(self.stored_shape) * STORED_BYTES[self.dtype]

    def chunks(self) -> Iterator[memoryview]:
        for piece in self.pieces:
            yield np.ascontiguousarray(piece).data


Entry = QuantEntry | ArrayEntry | StoredEntry
