"""Second moments and GPTQ on a GPU: `gptq.py` in float32, with the matrices on the device."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from uq.formats.spec import QuantTensor, Spec
from uq.kernels.vulkan.dense.cells import Cell, Levels, Row
from uq.kernels.vulkan.dense.factor import inverse_cholesky
from uq.kernels.vulkan.dense.grids import (
    BYTES,
    SYMMETRIC,
    ZEROS,
    Curvature,
    GridKind,
    Quantizer,
)
from uq.kernels.vulkan.dense.layer import Tokens, power_below, row_norms
from uq.kernels.vulkan.dense.matrix import Matrix
from uq.kernels.vulkan.dense.workshop import Workshop
from uq.quantize.calibration_engine import Array
from uq.quantize.descent import SWEEPS
from uq.quantize.factor import DIAGONAL_FLOOR, ESCALATION, unusable
from uq.quantize.grids import range_steps, symmetric_steps
from uq.quantize.plan import GptqOptions
from uq.quantize.refit import REFIT_RIDGE
from uq.quantize.scales import relative_importance, stored_scales

MADE = 2.0**8  # times numbers of at most 2^5: far from overflow and from the smallest float16


@dataclass(frozen=True)
class DeviceStatistics:
    """`Statistics` on a device, over a power of two; `scale` waits to be applied.

    Attributes:
        diagonal: (n,) of the Hessian, in its unit.
        unit: power of two that the matrices were multiplied by.
        placed: id of a weight -> the same on the device.
        made: id of a tensor -> its weight on the device, as it meets inputs that are not rescaled.
        scale: (n,) that the inputs are divided by; None: by 1.
        is_applied: the matrices are those of the divided inputs already.
    """

    workshop: Workshop
    hessian: Matrix
    cross: Matrix | None
    wanted: Matrix | None
    diagonal: Array
    unit: float
    placed: dict[int, Matrix]
    made: dict[int, Tokens]
    scale: Array | None = None
    is_applied: bool = False

    @classmethod
    def of(
        cls,
        workshop: Workshop,
        hessian: Matrix,
        *,
        cross: Matrix | None = None,
        wanted: Matrix | None = None,
    ) -> DeviceStatistics:
        """Brings the mean of the diagonal to 1 to 2; of `hessian` the lower half is set."""
        workshop.cells.run(Cell.MIRROR, hessian, hessian)
        vector = workshop.store.matrix("diagonal", 1, hessian.cols)
        workshop.cells.run(Cell.GET_DIAGONAL, vector, hessian)
        diagonal = workshop.store.numbers(vector.span, hessian.cols).copy()
        unit = power_below(2.0, float(diagonal.mean(dtype=np.float64)))
        found = cls(workshop, hessian, cross, wanted, diagonal, 1.0, {}, {})
        return found._scaled(None, unit)

    @property
    def importance(self) -> Array:
        found: Array = self.diagonal / np.float32(self.unit)
        return found if self.scale is None or self.is_applied else found / self.scale**2

    def rescaled(self, scale: Array) -> DeviceStatistics:
        """Of the inputs divided by `scale`."""
        return self if (scale == 1).all() else replace(self, scale=scale)

    def subtract_present(self, weight: Array, correction: float) -> None:
        """wanted -= correction * weight H."""
        assert self.wanted is not None
        store, cells = self.workshop.store, self.workshop.cells
        source = self.source(weight)
        copy = store.matrix("weight", source.rows, source.cols)
        factor = power_below(1.0, row_norms(cells, store, source)[1])
        cells.run(Cell.COPY, copy, source, alpha=factor)
        self.workshop.products.multiply(
            self.wanted, copy, self.hessian, alpha=-correction / factor, add=True
        )

    def source(self, weight: Array) -> Matrix:
        """A weight on the device."""
        found = self.placed.get(id(weight))
        return self.workshop.store.put("uploaded", weight) if found is None else found

    def factorize(self, damping: float) -> DeviceSolver | str:
        """As `StageStatistics` asks for it."""
        diagonal = self.diagonal
        mean = float(diagonal.mean(dtype=np.float64))
        if not math.isfinite(mean) or mean <= 0:
            return unusable(diagonal.astype(np.float64)[None])
        here = self._applied()
        return here._factorized(damping) or unusable(np.ones((1, 1)))

    def _applied(self) -> DeviceStatistics:
        """With `scale` applied, and the mean of the diagonal at 1 to 2 again."""
        if self.scale is None or self.is_applied:
            return self
        mean = float((self.diagonal / self.scale**2).mean(dtype=np.float64))
        done = self._scaled(np.float32(1) / self.scale, power_below(2.0, mean))
        return replace(done, is_applied=True)

    def _scaled(self, factors: Array | None, unit: float) -> DeviceStatistics:
        cells, store = self.workshop.cells, self.workshop.store
        by = None if factors is None else store.vector("column factors", factors)
        for matrix in (self.hessian, self.cross):
            if matrix is not None:
                cells.run(Cell.COPY, matrix, matrix, by_row=by, by_col=by, alpha=unit)
        if self.wanted is not None:
            cells.run(Cell.COPY, self.wanted, self.wanted, by_col=by, alpha=unit)
        squared = np.float32(1) if factors is None else factors**2
        diagonal = self.diagonal * squared * np.float32(unit)
        return replace(self, diagonal=diagonal, unit=self.unit * unit)

    def _factorized(self, damping: float) -> DeviceSolver | None:
        workshop, n = self.workshop, self.hessian.cols
        store = workshop.store
        diagonal = self.diagonal.astype(np.float64)
        order = np.argsort(-self.diagonal, kind="stable")
        with workshop.stream.phase("factor"):
            for attempt, factor in enumerate(ESCALATION, start=1):
                floor = DIAGONAL_FLOOR * diagonal.max() if attempt == len(ESCALATION) else 0.0
                damped = np.maximum(diagonal, floor) + factor * damping * diagonal.mean()
                upper = self._upper(order, damped)
                if upper is None:
                    continue
                vector = store.matrix("pivots", 1, n)
                workshop.cells.run(Cell.GET_DIAGONAL, vector, upper)
                left = np.empty(n)
                left[order] = store.numbers(vector.span, n).astype(np.float64) ** -2
                if np.isfinite(left).all():
                    return DeviceSolver(self, self._curvature(order, upper), left)
        return None

    def _curvature(self, order: NDArray[np.intp], upper: Matrix) -> Curvature:
        store, n = self.workshop.store, len(order)
        places = np.empty(n, np.uint32)
        places[order] = np.arange(n, dtype=np.uint32)
        diagonal = store.put("diagonal", self.diagonal[None])
        return Curvature(
            self.hessian,
            diagonal,
            upper,
            store.vector("order", order.astype(np.uint32)),
            store.vector("places", places),
        )

    def _upper(self, order: NDArray[np.intp], damped: NDArray[np.float64]) -> Matrix | None:
        """U of the damped Hessian by place; None where that is not positive definite."""
        workshop, n = self.workshop, len(order)
        store, cells = workshop.store, workshop.cells
        matrix, inverse = store.matrix("damped", n, n), store.matrix("inverse", n, n)
        backwards = store.vector("index", order[::-1].astype(np.uint32))
        cells.run(Cell.SQUARE, matrix, self.hessian, index=backwards)
        entries = store.put("entries", damped[order[::-1]].astype(np.float32)[None])
        cells.run(Cell.SET_DIAGONAL, matrix, entries)
        workshop.stream.clear(inverse.span)
        failed = store.vector("failed", np.zeros(1, np.uint32))
        inverse_cholesky(workshop.stream, workshop.products, matrix, inverse, failed)
        if store.numbers(failed, 1).view(np.uint32)[0]:
            return None
        flip = store.vector("index", np.arange(n - 1, -1, -1, dtype=np.uint32))
        cells.run(Cell.SQUARE, matrix, inverse, index=flip)
        return matrix


class DeviceSolver:
    """A `GptqSolver` on a device."""

    def __init__(
        self, statistics: DeviceStatistics, curvature: Curvature, left: NDArray[np.float64]
    ) -> None:
        """`left`: as `left_variances` gives it."""
        self._statistics, self._curvature, self._left = statistics, curvature, left
        workshop = statistics.workshop
        self._workshop, self._store, self._cells = workshop, workshop.store, workshop.cells
        self._products, self._phase = workshop.products, workshop.stream.phase
        self._quantizer = Quantizer(*workshop.tools)
        self._errors: dict[int, float] = {}  # id of a tensor that was made here

    def quantize(
        self,
        weight: Array,
        spec: Spec,
        options: GptqOptions,
        blocks: Sequence[Array] | None = None,
    ) -> QuantTensor:
        """As `quantize_gptq`; the curvature of the outputs is not used."""
        quantizer, curvature = self._quantizer, self._curvature
        with self._phase("upload"):
            placed, unit = self._placed(weight)
        with self._phase("target"):
            target, by_place = self._target(placed, unit, options)
        with self._phase("round"):
            grid = quantizer.search(target, grid_kind(spec), self._importance, unit)
            self._store_scales(grid, spec, unit)
            quantizer.round(by_place, grid, curvature)
        outputs = self._store.matrix("outputs", target.rows, target.cols)
        damping = options.damping * float(self._statistics.diagonal.mean(dtype=np.float64))
        if options.refit:
            with self._phase("refit"):
                self._products.multiply(outputs, target, curvature.hessian)
                self._refit(outputs, grid, spec, unit)
        for _ in range(options.descents):
            with self._phase("descent"):
                quantizer.descend(target, grid, curvature, damping, SWEEPS)
            if options.refit:
                with self._phase("refit"):
                    self._refit(outputs, grid, spec, unit)
        with self._phase("error"):
            error = self._error(placed, grid)
        with self._phase("download"):
            found = self._tensor(grid, spec, unit)
        self._errors[id(found)] = error
        self._statistics.made[id(found)] = self._half(grid, unit)
        return found

    def _refit(self, outputs: Matrix, grid: Levels, spec: Spec, unit: float) -> None:
        self._quantizer.refit(outputs, grid, self._curvature, REFIT_RIDGE, unit)
        self._store_scales(grid, spec, unit)

    def _store_scales(self, grid: Levels, spec: Spec, unit: float) -> None:
        """Round the scales to those that the spec can store; done by the host."""
        if spec.row_step:
            rows, used = grid.levels.rows, grid.levels.cols // spec.group
            scales = self._store.numbers(grid.scales, rows * grid.groups).reshape(rows, -1).copy()
            found = (scales[:, :used] * np.float32(unit)).astype(np.float16)
            scales[:, :used] = stored_scales(found, spec).astype(np.float32) / np.float32(unit)
            self._workshop.stream.write(grid.scales.part(0, scales.nbytes), scales)

    def _half(self, grid: Levels, unit: float) -> Tokens:
        """What was found as a weight of the layer. Columns are divided by at most 2^4."""
        levels, scale = grid.levels, self._statistics.scale
        name = f"made {len(self._statistics.made)}"
        half = self._store.matrix(name, levels.rows, levels.cols, "f16")
        by = None
        if scale is not None:
            by = self._store.vector("column factors", np.float32(1) / scale)
        self._cells.run(Cell.WEIGHT, half, grid=grid, by_col=by, alpha=MADE)
        return Tokens(half, MADE / unit)

    def output_error(self, weight: Array, quantized: QuantTensor) -> float:
        """As `output_error` of gptq.py."""
        if id(quantized) in self._errors:
            return self._errors[id(quantized)]
        scale = self._statistics.scale
        weight = weight if scale is None else weight * scale
        unit = np.float32(power_below(1.0, float(np.abs(weight).max())))
        placed = self._store.put("weight", weight * unit)
        missing = self._store.put("missing", (weight - quantized.dequantize()) * unit)
        return self._ratio(placed, missing)

    @property
    def _importance(self) -> Array:
        """(n,) as `scale_importance`, with mean 1."""
        found = np.sqrt(self._statistics.diagonal * self._left).astype(np.float32)
        return relative_importance(found, len(found))

    def _placed(self, weight: Array) -> tuple[Matrix, float]:
        """The weight behind the rescaled inputs, over a power of two that leaves its largest
        magnitude at 0.5 to 1, and that power."""
        source, scale = self._statistics.source(weight), self._statistics.scale
        by = None if scale is None else self._store.vector("column factors", scale)
        placed = self._store.matrix("weight", source.rows, source.cols)
        self._cells.run(Cell.COPY, placed, source, by_col=by)
        unit = 1.0 / power_below(1.0, row_norms(self._cells, self._store, placed)[1])
        self._cells.run(Cell.COPY, placed, placed, alpha=1.0 / unit)
        return placed, unit

    def _target(self, weight: Matrix, unit: float, options: GptqOptions) -> tuple[Matrix, Matrix]:
        """The weight that is rounded, by column and by place."""
        cells, store, products = self._cells, self._store, self._products
        shape, found = (weight.rows, weight.cols), self._statistics
        by_place = store.matrix("by place", *shape)
        curvature = self._curvature
        if found.cross is None and found.wanted is None:
            cells.run(Cell.GATHER, by_place, weight, index=curvature.order)
            return weight, by_place
        goal, target = store.matrix("goal", *shape), store.matrix("target", *shape)
        if found.cross is not None:
            products.multiply(goal, weight, found.cross, alpha=options.correction, b_by_k=True)
        if found.wanted is not None:
            cells.run(Cell.COPY, goal, found.wanted, alpha=1.0 / unit)
        half = store.matrix("slope", *shape)
        cells.run(Cell.GATHER, by_place, goal, index=curvature.order)
        products.multiply(half, by_place, curvature.upper)
        cells.run(Cell.GATHER, by_place, weight, index=curvature.order)
        products.multiply(by_place, half, curvature.upper, add=True, b_by_k=True)
        cells.run(Cell.GATHER, target, by_place, index=curvature.places)
        return target, by_place

    def _error(self, weight: Matrix, grid: Levels) -> float:
        missing = self._store.matrix("missing", weight.rows, weight.cols)
        self._cells.run(Cell.MISSING, missing, weight, grid=grid)
        return self._ratio(weight, missing)

    def _ratio(self, weight: Matrix, missing: Matrix) -> float:
        energy = self._energy(weight)
        return math.sqrt(max(self._energy(missing), 0.0) / energy) if energy > 0 else 0.0

    def _energy(self, matrix: Matrix) -> float:
        """Sum over the rows of m H m^T."""
        outputs = self._store.matrix("slope", matrix.rows, matrix.cols)
        self._products.multiply(outputs, matrix, self._curvature.hessian)
        sums = self._store.span("sums", 4 * matrix.height)
        self._cells.rows(Row.DOT, sums, 1, outputs, other=matrix)
        return math.fsum(self._store.numbers(sums, matrix.rows))

    def _tensor(self, grid: Levels, spec: Spec, unit: float) -> QuantTensor:
        levels, groups = grid.levels, grid.groups
        used = levels.cols // spec.group
        codes = np.ascontiguousarray(self._store.get(levels))
        scales = self._store.numbers(grid.scales, levels.rows * groups) * np.float32(unit)
        scales = scales.reshape(-1, groups)[:, :used].astype(np.float16)
        if not spec.zero_point:
            return QuantTensor(codes, scales, spec)
        lows = self._store.numbers(grid.lows, levels.rows * groups).reshape(-1, groups)
        zeros = (spec.qmin - lows[:, :used]).astype(np.int8)
        return QuantTensor(codes + zeros.repeat(spec.group, axis=1), scales, spec, zeros)


def grid_kind(spec: Spec) -> GridKind:
    limits = (spec.group, spec.qmin, spec.qmax, spec.zero_step)
    if spec.bits == 8:
        return GridKind(BYTES, *limits, symmetric_steps(spec.qmin))
    if spec.zero_point:
        return GridKind(ZEROS, *limits, range_steps(spec.qmax - spec.qmin))
    return GridKind(SYMMETRIC, *limits, symmetric_steps(spec.qmin))
