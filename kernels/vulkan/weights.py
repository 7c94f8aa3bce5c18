"""Weights on the device: `igpu` tiles as a bundle holds them, or floats in tiles of that shape."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from uq.formats.layouts import LAYOUTS
from uq.formats.spec import Spec
from uq.kernels.vulkan.memory import Arena, Span, Transfers, aligned

TILE = LAYOUTS["igpu"]
TILE_ROWS, TILE_COLS = 16, 128
FLOAT_BYTES = {"f16": 2, "bf16": 2, "f32": 4}


@dataclass(frozen=True)
class Kind:
    """How a weight is stored: the name that kernels are called by, and channels of a scale."""

    name: str
    group: int

    @property
    def is_float(self) -> bool:
        return self.name in FLOAT_BYTES

    @classmethod
    def of(cls, spec: Spec) -> Kind:
        return cls(f"int{spec.bits}{'z' * spec.zero_point}", spec.group)


class Record(Protocol):
    """What a source says about a weight."""

    @property
    def shape(self) -> tuple[int, int]: ...

    @property
    def spec(self) -> Spec: ...

    @property
    def layout(self) -> str: ...


class Source(Protocol):
    """Where the weights come from: a bundle, a checkpoint, or the tests' and benchmarks' own."""

    def raw(self, name: str) -> tuple[NDArray[np.uint8], Record]:
        """Bytes of a tiled weight."""
        ...

    def array(self, name: str) -> NDArray[np.float32]:
        """A norm's gain."""
        ...


@dataclass(frozen=True)
class Matrix:
    """One or more weights of a kind, their row blocks one after the other.

    Attributes:
        rows: with the padding of every weight but the last.
        nbytes: of codes and scales, without padding.
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
    """Puts weights of a source into an arena."""

    source: Source
    arena: Arena
    transfers: Transfers

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
        values = np.ascontiguousarray(self.source.array(name), np.float32)
        span = self.arena.take(values.nbytes)
        self.transfers.write(span, values)
        return span

    def _runs(self, names: Sequence[str]) -> list[list[str]]:
        runs: list[list[str]] = []
        before: Kind | None = None
        for name in names:
            kind = Kind.of(self.source.raw(name)[1].spec)
            if kind != before:
                runs.append([])
            runs[-1].append(name)
            before = kind
        return runs

    def _load(self, names: Sequence[str]) -> Matrix:
        records = [self.source.raw(name)[1] for name in names]
        spec, cols = records[0].spec, records[0].shape[1]
        sizes = [TILE.nbytes(*record.shape, spec) for record in records]
        span = self.arena.take(sum(sizes))
        start = 0
        for name, size in zip(names, sizes, strict=True):
            self.transfers.write(span.part(start, size), _tiled(*self.source.raw(name)))
            start += size
        *inner, last = [record.shape[0] for record in records]
        rows = sum(padded_rows(count) for count in inner) + last
        nbytes = sum(spec.nbytes(*record.shape) for record in records)
        return Matrix(Kind.of(spec), rows, cols, span, nbytes)


def _tiled(raw: NDArray[np.uint8], record: Record) -> NDArray[Any]:
    if record.layout == TILE.name:
        return raw
    return TILE.tile(LAYOUTS[record.layout].untile(raw, record.shape, record.spec))


def weight_bytes(source: Source, names: Sequence[str]) -> int:
    """Device bytes of weights, the arena's padding included."""
    records = [source.raw(name)[1] for name in names]
    return sum(aligned(TILE.nbytes(*record.shape, record.spec)) for record in records)
