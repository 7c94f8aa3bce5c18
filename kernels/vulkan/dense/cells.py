"""Work on a matrix element by element, and row by row."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum

from uq.kernels.vulkan.dense.matrix import Matrix
from uq.kernels.vulkan.dense.stream import Stream
from uq.kernels.vulkan.memory import Span
from uq.kernels.vulkan.push import words

LANES = 128


class Cell(IntEnum):
    """As in shaders/dense_cells.comp."""

    COPY = 0
    GATHER = 1
    SQUARE = 2
    MIRROR = 3
    WEIGHT = 4
    MISSING = 5
    LEVELS = 6
    HALVES = 7
    GEGLU = 8
    SET_DIAGONAL = 9
    GET_DIAGONAL = 10
    GATHER_BYTES = 11


class Row(IntEnum):
    """As in shaders/dense_rows.comp."""

    NORM = 0
    NORM_CHANGE = 1
    JOIN = 2
    SIZE = 3
    WANTED = 4
    DOT = 5
    EXTENT = 6


@dataclass(frozen=True)
class Levels:
    """A weight on its grid: level * scale. `lows` is the lowest level of each group.

    Attributes:
        levels: (rows, n) bytes.
        scales, lows: (rows, groups) float32, of the padded weight.
        span: highest less lowest level.
    """

    levels: Matrix
    scales: Span
    lows: Span
    group: int
    span: int

    @property
    def groups(self) -> int:
        return self.levels.stride // self.group


class Cells:
    """The two kernels of many small operations."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream

    def run(
        self,
        op: Cell,
        result: Matrix,
        source: Matrix | None = None,
        *,
        other: Matrix | None = None,
        grid: Levels | None = None,
        index: Span | None = None,
        by_row: Span | None = None,
        by_col: Span | None = None,
        alpha: float = 1.0,
        beta: float = 0.0,
    ) -> None:
        """Fill `result`, padding included.

        Args:
            other: second matrix of GEGLU, float16 of HALVES, bytes of GATHER_BYTES.
            grid: of WEIGHT, MISSING and LEVELS.
            index: columns to take, uint32.
            by_row, by_col: factors, float32.
            beta: SQUARE and SET_DIAGONAL add it to the diagonal.
        """
        side = grid.levels if grid else other
        whole = source or side or result
        nothing = result.span
        spans = [result.span, whole.span, (side or whole).span]
        spans += [grid.scales if grid else nothing, index or nothing]
        spans += [by_row or nothing, by_col or nothing]
        push = struct.pack(
            "<7Q5I2f",
            *(span.address for span in spans),
            result.stride,
            whole.stride,
            grid.groups if grid else 0,
            whole.rows,
            whole.cols,
            alpha,
            beta,
        )
        diagonal = op in (Cell.SET_DIAGONAL, Cell.GET_DIAGONAL)
        pairs = -(-(whole.cols if diagonal else result.stride) // (2 * LANES))
        constants: dict[str, int | float] = {
            "LANES": LANES,
            "OP": int(op),
            "HALF_OUT": result.kind == "f16",
            "BY_ROW": by_row is not None,
            "BY_COL": by_col is not None,
        }
        if grid:
            constants["GROUP"] = grid.group
        self._stream.dispatch(
            "dense_cells", push, (pairs, 1 if diagonal else result.height, 1), constants
        )

    def rows(
        self,
        op: Row,
        result: Span,
        stride: int,
        source: Matrix,
        *,
        other: Matrix | None = None,
        gain: Span | None = None,
        sizes: Span | None = None,
        branch: Matrix | None = None,
        factors: Span | None = None,
        eps: float = 0.0,
        factor: float = 1.0,
        correction: float = 0.0,
        residual: float = 0.0,
    ) -> None:
        """One workgroup for each padded row of `source`.

        Args:
            stride: of the result, in elements.
            factor: of what is stored as float16.
        """
        spans = [result, source.span, (other or source).span, gain or result, sizes or result]
        spans += [(branch or source).span, factors or result]
        push = struct.pack("<7Q", *(span.address for span in spans))
        push += words(stride, source.stride, source.cols)
        push += struct.pack("<4f", eps, factor, correction, residual)
        constants: dict[str, int | float] = {
            "LANES": LANES,
            "OP": int(op),
            "HAS_GAIN": gain is not None,
        }
        self._stream.dispatch("dense_rows", push, (source.height, 1, 1), constants)
