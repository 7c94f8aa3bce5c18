"""Matrices in the memory of a device."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from uq.kernels.vulkan.dense.stream import Stream
from uq.kernels.vulkan.memory import Arena, Span

TILE = 128  # heights and widths are multiples of it
SIZES = {"f32": 4, "f16": 2, "i8": 1}


@dataclass(frozen=True)
class Matrix:
    """A padded matrix, or a block of one.

    Attributes:
        rows, cols: what is not padding.
        height, width: with padding.
        stride: elements from a row to the next one.
        kind: a key of `SIZES`.
    """

    span: Span
    rows: int
    cols: int
    height: int
    width: int
    stride: int
    kind: str

    @property
    def address(self) -> int:
        return self.span.address

    def block(self, row: int, col: int, height: int, width: int) -> Matrix:
        """The block that begins at (row, col), without padding of its own."""
        start = SIZES[self.kind] * (row * self.stride + col)
        span = self.span.part(start, self.span.nbytes - start)
        return Matrix(span, height, width, height, width, self.stride, self.kind)

    def with_rows(self, rows: int) -> Matrix:
        """The first rows."""
        return replace(self, rows=rows, height=padded(rows))


def padded(size: int) -> int:
    return -(-size // TILE) * TILE


class Store:
    """Named matrices: the same name is the same memory, so that layers follow each other in it."""

    def __init__(self, stream: Stream, arena: Arena) -> None:
        self._stream, self._arena = stream, arena
        self._spans: dict[str, Span] = {}

    @property
    def nbytes(self) -> int:
        return self._arena.nbytes

    def matrix(
        self, name: str, rows: int, cols: int, kind: str = "f32", *, spare: int = 0
    ) -> Matrix:
        """Contents are those of the last matrix of that name, finite in any case.

        Args:
            spare: rows of memory behind it.
        """
        height, width = padded(rows), padded(cols)
        span = self.span(name, SIZES[kind] * (height + spare) * width)
        return Matrix(span, rows, cols, height, width, width, kind)

    def span(self, name: str, nbytes: int) -> Span:
        """At least so many bytes."""
        found = self._spans.get(name)
        if found is None or found.nbytes < nbytes:
            found = self._arena.take(nbytes)
            self._stream.clear(found)
            self._spans[name] = found
        return found.part(0, nbytes)

    def put(self, name: str, values: NDArray[Any], kind: str = "f32") -> Matrix:
        """A matrix (rows, cols) of the host's."""
        rows, cols = values.shape
        matrix = self.matrix(name, rows, cols, kind)
        self.fill(matrix, values)
        return matrix

    def fill(self, matrix: Matrix, values: NDArray[Any]) -> None:
        """Write (rows, cols) of the host's, and zeros around them."""
        if (matrix.height, matrix.width) != values.shape:
            rows, cols = values.shape
            values = np.pad(values, ((0, matrix.height - rows), (0, matrix.width - cols)))
        self._stream.write(matrix.span, values)

    def vector(self, name: str, values: NDArray[Any]) -> Span:
        """Numbers of 32 bits, zeros behind them."""
        room = np.zeros(padded(len(values)), values.dtype)
        room[: len(values)] = values
        span = self.span(name, room.nbytes)
        self._stream.write(span, room)
        return span

    def constant(self, name: str, values: NDArray[np.float32]) -> Span:
        """A vector that is written once, whatever its name stands for."""
        name = f"{name} {len(values)}"
        return self._spans[name] if name in self._spans else self.vector(name, values)

    def numbers(self, span: Span, count: int) -> NDArray[np.float32]:
        """The first float32 on the host."""
        return self._stream.read(span.part(0, 4 * count)).view(np.float32)

    def get(self, matrix: Matrix) -> NDArray[Any]:
        """(rows, cols) on the host."""
        kinds = {"f32": np.float32, "f16": np.float16, "i8": np.int8}
        used = SIZES[matrix.kind] * matrix.rows * matrix.stride
        values = self._stream.read(matrix.span.part(0, used)).view(kinds[matrix.kind])
        return values.reshape(matrix.rows, matrix.stride)[:, : matrix.cols]
