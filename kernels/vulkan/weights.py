"""Weights on the device: `igpu` tiles as a bundle holds them, or floats in tiles of that shape."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from uq.formats.layouts import LAYOUTS
from uq.formats.spec import Spec
from uq.kernels.vulkan.imports import Imports, follows
from uq.kernels.vulkan.memory import Arena, Span, Transfers, aligned

TILE = LAYOUTS["igpu"]
TILE_ROWS, TILE_COLS = 16, 128
PIECES = 4  # of 32 columns, in a row of a tile
FLOAT_BYTES = {"f16": 2, "bf16": 2, "f32": 4}


@dataclass(frozen=True)
class Kind:
    """How a weight is stored: the name that kernels are called by; `spec` of integer codes."""

    name: str
    spec: Spec | None = None

    @classmethod
    def of(cls, spec: Spec) -> Kind:
        return cls(f"int{spec.bits}{'z' * spec.zero_point}", spec)

    @property
    def is_float(self) -> bool:
        return self.spec is None

    @property
    def group(self) -> int:
        """Channels that share a scale."""
        return 32 if self.spec is None else self.spec.group

    @property
    def constants(self) -> dict[str, int]:
        """Specialization constants of the kernels that read it."""
        return {"GROUP": self.group, "SCALE_BITS": self.spec.scale_bits if self.spec else 16}

    def tiled_bytes(self, rows: int, cols: int) -> int:
        if self.spec is not None:
            return TILE.nbytes(rows, cols, self.spec)
        return padded_rows(rows) * tiles_of(cols) * TILE_COLS * FLOAT_BYTES[self.name]

    def nbytes(self, rows: int, cols: int) -> int:
        """Without padding."""
        if self.spec is not None:
            return self.spec.nbytes(rows, cols)
        return rows * cols * FLOAT_BYTES[self.name]


@dataclass(frozen=True)
class Weight:
    """A weight that a source has; `read` gives the bytes of its tiles.

    Attributes:
        mapped: the same bytes where they lie in a mapped file; None where they do not.
    """

    kind: Kind
    shape: tuple[int, int]
    read: Callable[[], NDArray[Any]]
    mapped: NDArray[np.uint8] | None = None


class Source(Protocol):
    """Where weights come from: a bundle, a checkpoint, or the tests' and benchmarks' own."""

    def weight(self, name: str) -> Weight: ...

    def array(self, name: str) -> NDArray[np.float32]:
        """A norm's gain."""
        ...


@dataclass(frozen=True)
class Matrix:
    """One or more weights of a kind, their row blocks one after the other.

    Attributes:
        rows: with the padding of every weight but the last.
        nbytes: without padding.
    """

    kind: Kind
    rows: int
    cols: int
    span: Span
    nbytes: int

    @property
    def blocks(self) -> int:
        return -(-self.rows // TILE_ROWS)

    @property
    def tiles(self) -> int:
        """In a row block."""
        return tiles_of(self.cols)

    def from_row(self, row: int, rows: int) -> Matrix:
        """The matrix of `rows` rows that begins at `row`, a multiple of 16."""
        size = self.span.nbytes // self.blocks
        first, count = row // TILE_ROWS, -(-rows // TILE_ROWS)
        span = self.span.part(first * size, count * size)
        return Matrix(self.kind, rows, self.cols, span, self.nbytes * rows // self.rows)


def tiles_of(channels: int) -> int:
    return -(-channels // TILE_COLS)


def padded_rows(rows: int) -> int:
    return -(-rows // TILE_ROWS) * TILE_ROWS


@dataclass(frozen=True)
class Loader:
    """Puts weights of a source into an arena, or finds them in `imports`.

    Attributes:
        host: an arena of the host's memory, of models that need it.
    """

    source: Source
    arena: Arena
    transfers: Transfers
    imports: Imports | None = None
    host: Arena | None = None

    def matrices(self, names: Sequence[str]) -> list[tuple[Matrix, int]]:
        """Weights that multiply the same input: those of one kind next to each other become one.

        Returns:
            Matrices, and the row of the joint output at which each begins.
        """
        found: list[tuple[Matrix, int]] = []
        row = 0
        for run in self._runs(names):
            matrix = self._load(run)
            found.append((matrix, row))
            row += padded_rows(matrix.rows)
        return found

    def matrix(self, name: str) -> Matrix:
        return self._load([name])

    def gain(self, name: str) -> Span:
        return self.put(np.ascontiguousarray(self.source.array(name), np.float32))

    def put(self, values: NDArray[Any]) -> Span:
        span = self.arena.take(values.nbytes)
        self.transfers.write(span, values)
        return span

    def host_matrix(self, name: str) -> Matrix:
        """A weight of which a kernel reads little, in memory of the host."""
        assert self.host is not None
        return replace(self, arena=self.host).matrix(name)

    def _runs(self, names: Sequence[str]) -> list[list[str]]:
        runs: list[list[str]] = []
        before: Weight | None = None
        for name in names:
            weight = self.source.weight(name)
            if before is None or not self._joins(before, weight):
                runs.append([])
            runs[-1].append(name)
            before = weight
        return runs

    def _joins(self, before: Weight, weight: Weight) -> bool:
        """Whether two weights become one: of one kind, and neighbours if they are not moved."""
        moved = self.imports is None or not self.imports.holds(weight.mapped)
        return before.kind == weight.kind and (moved or follows(before.mapped, weight.mapped))

    def _load(self, names: Sequence[str]) -> Matrix:
        weights = [self.source.weight(name) for name in names]
        kind, cols = weights[0].kind, weights[0].shape[1]
        sizes = [kind.tiled_bytes(*weight.shape) for weight in weights]
        span = self.imports and self.imports.span([weight.mapped for weight in weights])
        span = span or self._copy(weights, sizes)
        *inner, last = [weight.shape[0] for weight in weights]
        rows = sum(padded_rows(count) for count in inner) + last
        nbytes = sum(kind.nbytes(*weight.shape) for weight in weights)
        return Matrix(kind, rows, cols, span, nbytes)

    def _copy(self, weights: Sequence[Weight], sizes: Sequence[int]) -> Span:
        span, start = self.arena.take(sum(sizes)), 0
        for weight, size in zip(weights, sizes, strict=True):
            self.transfers.write(span.part(start, size), weight.read())
            start += size
        return span


def weight_bytes(source: Source, names: Sequence[str]) -> int:
    """Device bytes of weights, the arena's padding included."""
    weights = [source.weight(name) for name in names]
    return sum(aligned(weight.kind.tiled_bytes(*weight.shape)) for weight in weights)
