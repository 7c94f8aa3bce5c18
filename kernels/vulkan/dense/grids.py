"""Levels and scales of a weight on a device: search, GPTQ's rounding, descent, refit.

What is computed is described in quantize/gptq.py, descent.py and grids.py; this is the same in
float32, in blocks of 128 columns: a block changes those near it at once, all others every 1024.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from uq.kernels.vulkan.dense.cells import Cell, Cells, Levels
from uq.kernels.vulkan.dense.matrix import TILE, Matrix, Store
from uq.kernels.vulkan.dense.products import Products
from uq.kernels.vulkan.dense.stream import MOST_WORK, Stream
from uq.kernels.vulkan.heaps import SHARING
from uq.kernels.vulkan.memory import Span
from uq.kernels.vulkan.push import addresses, words

LANES = 64
AHEAD = 1024  # columns between two products with all other columns
TEAM = 8  # lanes that share a row
SOLVE_LANES = 256
# Of the systems of the rows that are refitted together. Each round of conjugate gradients reads
# them all, so they are a submit's work: fewer where memory is that of the host.
SYSTEM_BYTES, SHARED_SYSTEM_BYTES = 1 << 31, 1 << 28
ROUNDS, TOLERANCE = 64, 1e-4  # of conjugate gradients
SYMMETRIC, ZEROS, BYTES = range(3)  # kinds of grid, as in shaders/dense_search.comp


@dataclass(frozen=True)
class GridKind:
    """What grids a search chooses from.

    Attributes:
        kind: one of SYMMETRIC, ZEROS, BYTES.
        zero_step: distance of zero points.
        steps: (24,) candidates, as of `symmetric_steps` or `range_steps`.
    """

    kind: int
    group: int
    qmin: int
    qmax: int
    zero_step: int
    steps: NDArray[np.float32]


@dataclass(frozen=True)
class Curvature:
    """Second moments of a linear's inputs on a device.

    Attributes:
        hessian: (n, n) float32.
        diagonal: (1, n) float32, its diagonal.
        upper: (n, n) as `Factor.upper`.
        order, places: uint32, column of a place and place of a column.
    """

    hessian: Matrix
    diagonal: Matrix
    upper: Matrix
    order: Span
    places: Span


class Quantizer:
    """The steps between a target and its levels."""

    def __init__(self, stream: Stream, store: Store, products: Products, cells: Cells) -> None:
        self._stream, self._store = stream, store
        self._products, self._cells = products, cells

    def search(
        self, target: Matrix, kind: GridKind, importance: NDArray[np.float32], unit: float
    ) -> Levels:
        """Scales and lowest levels of each group; the levels themselves are not set.

        Args:
            importance: (n,) with mean 1 and no zero.
            unit: a weight of 1 in `target` is one of `unit`, a power of two, in the model.
        """
        groups = target.stride // kind.group
        nbytes = 4 * target.height * groups
        scales, lows = self._store.span("scales", nbytes), self._store.span("lows", nbytes)
        levels = self._store.matrix("levels", target.rows, target.cols, "i8")
        weights = self._store.vector("importance", importance)
        steps = self._store.vector("steps", kind.steps)
        push = addresses(target.span, weights, steps, scales, lows)
        push += words(target.stride, groups, target.cols // kind.group)
        push += struct.pack("<4f", kind.qmin, kind.qmax, kind.zero_step, unit)
        grid = (-(-groups // LANES), target.height, 1)
        constants = {"LANES": LANES, "GROUP": kind.group, "KIND": kind.kind}
        self._stream.dispatch("dense_search", push, grid, dict(constants))
        return Levels(levels, scales, lows, kind.group, kind.qmax - kind.qmin)

    def round(self, by_place: Matrix, grid: Levels, curvature: Curvature) -> None:
        """GPTQ: set the levels. Overwrites `by_place`, the target in the order of rounding."""
        height, n = by_place.height, by_place.width
        rounded = self._store.matrix("levels by place", by_place.rows, by_place.cols, "i8")
        upper = curvature.upper
        for first in range(0, n, AHEAD):
            last = min(first + AHEAD, n)
            errors = self._changes(height)
            for start in range(first, last, TILE):
                block = errors.block(0, start - first, height, TILE)
                push = addresses(by_place.span, upper.span, block.span, curvature.order)
                push += addresses(grid.scales, grid.lows, rounded.span)
                push += words(n, grid.groups, start, AHEAD) + struct.pack("<f", grid.span)
                self._by_teams("dense_round", push, height, grid.group)
                self._spread(by_place, block, upper, start, slice(start + TILE, last))
            self._spread(by_place, errors, upper, first, slice(last, n))
        self._cells.run(Cell.GATHER_BYTES, grid.levels, other=rounded, index=curvature.places)

    def descend(
        self, target: Matrix, grid: Levels, curvature: Curvature, damping: float, sweeps: int
    ) -> None:
        """Coordinate descent: move levels to where the output error is smaller.

        Args:
            damping: added to the Hessian's diagonal.
        """
        height, n = target.height, target.width
        missing = self._store.matrix("missing", target.rows, target.cols)
        slope = self._store.matrix("slope", target.rows, target.cols)
        hessian, diagonal = curvature.hessian, curvature.diagonal
        self._cells.run(Cell.SET_DIAGONAL, hessian, diagonal, beta=damping)
        self._cells.run(Cell.MISSING, missing, target, grid=grid)
        self._products.multiply(slope, missing, hessian)
        for first in list(range(0, n, AHEAD)) * sweeps:
            last = min(first + AHEAD, n)
            changes = self._changes(height)
            for start in range(first, last, TILE):
                block = changes.block(0, start - first, height, TILE)
                push = addresses(slope.span, hessian.span, block.span)
                push += addresses(grid.scales, grid.lows, grid.levels.span)
                push += words(n, grid.groups, start, AHEAD) + struct.pack("<f", grid.span)
                self._by_teams("dense_descend", push, height, grid.group)
                self._spread(slope, block, hessian, start, slice(first, last))
            self._spread(slope, changes, hessian, first, slice(0, first))
            self._spread(slope, changes, hessian, first, slice(last, n))
        self._cells.run(Cell.SET_DIAGONAL, hessian, diagonal)

    def _changes(self, height: int) -> Matrix:
        """What a run of blocks changes, kept until the columns behind the run get it."""
        return self._store.matrix("changes", height, AHEAD)

    def _spread(
        self, target: Matrix, changes: Matrix, matrix: Matrix, row: int, columns: slice
    ) -> None:
        """target[:, columns] -= changes matrix[row : , columns], as many rows as changes."""
        width = columns.stop - columns.start
        if width <= 0:
            return
        count = min(changes.width, matrix.height - row)
        part = target.block(0, columns.start, target.height, width)
        left = changes.block(0, 0, target.height, count)
        right = matrix.block(row, columns.start, count, width)
        self._products.multiply(part, left, right, alpha=-1.0, add=True, b_by_k=True)

    def refit(
        self, outputs: Matrix, grid: Levels, curvature: Curvature, ridge: float, unit: float
    ) -> None:
        """Scales that fit the target best while the levels stay.

        Args:
            outputs: (rows, n) target H.
            ridge: in units of the mean of each system's diagonal.
            unit: as of `search`.
        """
        height, n, groups = outputs.height, outputs.width, grid.groups
        used = outputs.cols // grid.group
        levels = self._store.matrix("half levels", outputs.rows, outputs.cols, "f16")
        self._cells.run(Cell.LEVELS, levels, grid=grid)
        shares = self._stream.gpu.physical.kind in SHARING
        most = SHARED_SYSTEM_BYTES if shares else SYSTEM_BYTES
        rows = max(TILE, most // (4 * groups**2) // TILE * TILE)
        systems = self._store.span("systems", 4 * groups**2 * min(rows, height))
        constants = {"LANES": SOLVE_LANES, "GROUP": grid.group, "GROUPS": groups, "ROUNDS": ROUNDS}
        for start in range(0, height, rows):
            count = min(rows, height - start)
            here = levels.block(start, 0, count, n)
            self._products.systems(systems, here, curvature.hessian, grid.group)
            scales = grid.scales.part(4 * start * groups, 4 * count * groups)
            push = addresses(systems, outputs.block(start, 0, count, n).span, here.span, scales)
            push += words(n, used) + struct.pack("<3f", ridge, TOLERANCE, unit)
            work = MOST_WORK * count / rows
            self._stream.dispatch("dense_solve", push, (count, 1, 1), dict(constants), work)

    def _by_teams(self, name: str, push: bytes, height: int, group: int) -> None:
        groups = height * TEAM // LANES
        self._stream.dispatch(name, push, (groups, 1, 1), {"LANES": LANES, "GROUP": group})
