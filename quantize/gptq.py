"""GPTQ: rounding column by column, each column's error spread over the columns still to come.

Frantar et al., "GPTQ" (2022), Algorithm 1, with the scales fixed beforehand (static groups) and the
columns in order of falling importance. Around it, all optional: a damped correction of the weights
towards the outputs of the floating-point path (the idea of Qronos and GPTAQ in closed form) and
towards what the residual stream has lost before; a least-squares refit of the scales once the codes
are known; coordinate descent on the codes (`descent.py`); and both once more for all rows together
(`two_sided.py`).

Index spaces: `col` counts a weight's own columns, `place` counts columns in the order of rounding,
`order[place] == col`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import repeat

import numpy as np
from numba import njit, prange
from numpy.typing import NDArray

from uq.formats.spec import QuantTensor, Spec
from uq.quantize.descent import damped, descend
from uq.quantize.factor import Factor, Matrix, factorize, unusable
from uq.quantize.plan import GptqOptions, WorkSizes
from uq.quantize.refit import refit_scales
from uq.quantize.scales import quantize_rtn, stacked, stored_scales
from uq.quantize.two_sided import DESCENTS, round_together

OUTPUTS = 2048  # rows of a linear whose outputs are taken together, at most
BLOCK = 128  # columns rounded before the columns behind them are updated in one product


@dataclass(frozen=True)
class Statistics:
    """Second moments of the inputs of one linear, or of several that share them.

    Attributes:
        hessian: (n, n), weighted mean of x x^T over the tokens of the quantized path. Its type,
            which the others and all that is computed from them share, is that of `moments.py`.
        cross: (n, n), that of (x_float - x) x^T, for linears that share inputs and are corrected
            towards the floating-point path.
        wanted: (rows, n), that of r x^T, with r what the outputs should change by, for a linear of
            its own.
        scale: (n,) what the inputs were divided by.
        row_numbers: weights whose errors are summed at once.
    """

    hessian: Matrix
    cross: Matrix | None
    wanted: Matrix | None = None
    scale: NDArray[np.float32] | None = None
    row_numbers: int = WorkSizes.row_numbers

    @property
    def importance(self) -> NDArray[np.float32]:
        """(n,) mean square of each input channel."""
        return np.diagonal(self.hessian).astype(np.float32)

    def rescaled(self, scale: NDArray[np.float32]) -> Statistics:
        """Of the inputs divided by `scale`, (n,); in place."""
        if (scale == 1).all():
            return self
        for row, factor in enumerate(scale):
            self.hessian[row] /= factor * scale
            if self.cross is not None:
                self.cross[row] /= factor * scale
        if self.wanted is not None:
            np.divide(self.wanted, scale, out=self.wanted)
        return replace(self, scale=scale)

    def of_rows(self, rows: slice) -> Statistics:
        """For some rows of the linear."""
        return replace(self, wanted=None if self.wanted is None else self.wanted[rows])

    def factorize(self, damping: float) -> FactorizedStatistics | str:
        """As `StageStatistics` asks for it."""
        factor = factorize(self.hessian, damping)
        return unusable(self.hessian) if factor is None else FactorizedStatistics(self, factor)


@dataclass(frozen=True)
class FactorizedStatistics:
    """A `GptqSolver` in main memory."""

    statistics: Statistics
    factor: Factor

    def quantize(
        self,
        weight: NDArray[np.float32],
        spec: Spec,
        options: GptqOptions,
        blocks: Sequence[NDArray[np.float32]] | None = None,
    ) -> QuantTensor:
        weight = self._behind(weight)
        return quantize_gptq(weight, spec, self.statistics, self.factor, options, blocks)

    def output_error(self, weight: NDArray[np.float32], quantized: QuantTensor) -> float:
        hessian, numbers = self.statistics.hessian, self.statistics.row_numbers
        return output_error(self._behind(weight), quantized, hessian, numbers)

    def _behind(self, weight: NDArray[np.float32]) -> NDArray[np.float32]:
        """The weight that the rescaled inputs meet."""
        scale = self.statistics.scale
        return weight if scale is None else weight * scale


def quantize_gptq(
    weight: NDArray[np.float32],
    spec: Spec,
    statistics: Statistics,
    factor: Factor,
    options: GptqOptions,
    outputs: Sequence[NDArray[np.float32]] | None = None,
) -> QuantTensor:
    """Quantize one linear, `row_numbers` weights at a time: the parts are independent.

    Args:
        weight: (rows, n) float32, finite.
        factor: of `statistics.hessian`.
        outputs: (rows, rows) curvature of the outputs of each part, which then are those of
            `output_blocks`; rows are independent without.
    """
    hessian = statistics.hessian.astype(np.float32, copy=False)
    numbers = options.work.row_numbers
    rows = list((row_blocks if outputs is None else output_blocks)(weight.shape, numbers))
    parts = [
        _quantize_rows(weight[here], spec, statistics.of_rows(here), hessian, factor, options, bent)
        for here, bent in zip(rows, outputs or repeat(None, len(rows)), strict=True)
    ]
    return parts[0] if len(parts) == 1 else stacked(parts)


def _quantize_rows(
    weight: NDArray[np.float32],
    spec: Spec,
    statistics: Statistics,
    hessian: NDArray[np.float32],
    factor: Factor,
    options: GptqOptions,
    outputs: NDArray[np.float32] | None,
) -> QuantTensor:
    target = _target(weight.astype(statistics.hessian.dtype), statistics, factor, options)
    alone = partial(
        _round_rows,
        spec=spec,
        statistics=statistics,
        hessian=hessian,
        factor=factor,
        options=options if outputs is None else _shortened(options),
    )
    if outputs is None:
        return alone(target)
    return round_together(target, hessian, outputs, alone, options)


def _shortened(options: GptqOptions) -> GptqOptions:
    """For rows that are gone over again with all others."""
    return replace(options, descents=min(options.descents, DESCENTS))


def _round_rows(
    target: Matrix,
    spec: Spec,
    statistics: Statistics,
    hessian: NDArray[np.float32],
    factor: Factor,
    options: GptqOptions,
) -> QuantTensor:
    """Each row for itself."""
    importance = scale_importance(statistics, factor.left)
    goal = target.astype(np.float32, copy=False)
    found = quantize_rtn(goal, spec, importance)
    found = replace(found, codes=_round_columns(target, found, factor))
    if not np.isfinite(found.scales).all():  # the caller refuses the weight
        return found
    if options.refit:
        found = _refitted(goal, found, hessian)
    for _ in range(options.descents):
        with damped(hessian, options.damping):
            found = replace(found, codes=descend(goal, found, hessian))
        if options.refit:
            found = _refitted(goal, found, hessian)
    return found


def row_blocks(shape: tuple[int, ...], numbers: int) -> Iterator[slice]:
    """The rows of a matrix, about so many numbers at a time."""
    step = max(1, numbers // shape[1])
    return (slice(start, start + step) for start in range(0, shape[0], step))


def output_blocks(shape: tuple[int, ...], numbers: int) -> Iterator[slice]:
    """The rows of a linear whose outputs are taken together."""
    return row_blocks(shape, min(numbers, OUTPUTS * shape[1]))


def scale_importance(statistics: Statistics, left: NDArray[np.float64]) -> NDArray[np.float32]:
    """(n,) what scales are searched for: the geometric mean of a column's variance and what GPTQ
    leaves of it. Either alone gives errors larger by 1 to 2 %.
    """
    importance: NDArray[np.float32] = np.sqrt(statistics.importance * left).astype(np.float32)
    return importance


def _target(weight: Matrix, statistics: Statistics, factor: Factor, options: GptqOptions) -> Matrix:
    """(rows, n): the weight whose outputs on the quantized path come closest to the exact ones."""
    goal = np.zeros_like(weight)
    if statistics.cross is not None:
        goal += options.correction * (weight @ statistics.cross)
    if statistics.wanted is not None:
        goal += statistics.wanted
    return weight + factor.solve(goal)


def _refitted(
    target: NDArray[np.float32], tensor: QuantTensor, hessian: NDArray[np.float32]
) -> QuantTensor:
    fitted = refit_scales(target, tensor.levels(), tensor.scales, hessian)
    return replace(tensor, scales=stored_scales(fitted, tensor.spec))


def output_error(
    weight: NDArray[np.float32],
    quantized: QuantTensor,
    hessian: Matrix,
    row_numbers: int = WorkSizes.row_numbers,
) -> float:
    """Root mean square error of the outputs over their root mean square, on the inputs behind H."""
    moments = hessian.astype(np.float32, copy=False)
    energy = lost = 0.0
    for rows in row_blocks(weight.shape, row_numbers):
        part = weight[rows]
        error = part - quantized.rows(rows.start, rows.stop).dequantize()
        energy += float(np.vdot(part @ moments, part))
        lost += float(np.vdot(error @ moments, error))
    return float(np.sqrt(max(lost, 0.0) / energy)) if energy > 0 else 0.0


def _round_columns(target: Matrix, grid: QuantTensor, factor: Factor) -> NDArray[np.int8]:
    """Codes (rows, n) on the scales and zero points of `grid`."""
    rows, n = target.shape
    spec, scales = grid.spec, grid.scales.astype(target.dtype)
    zeros = np.zeros(scales.shape, np.int8) if grid.zeros is None else grid.zeros
    by_place = np.ascontiguousarray(target[:, factor.order])
    codes = np.empty((rows, n), np.int8)
    for start in range(0, n, BLOCK):
        stop = min(start + BLOCK, n)
        block = np.ascontiguousarray(by_place[:, start:stop])
        upper = np.ascontiguousarray(factor.upper[start:stop, start:stop])
        columns = factor.order[start:stop]
        errors = np.empty_like(block)
        _round_block(block, upper, columns, scales, zeros, spec.qmin, spec.qmax, errors, codes)
        by_place[:, stop:] -= errors @ factor.upper[start:stop, stop:]
    return codes


@njit(nogil=True, parallel=True, cache=True)
def _round_block(
    block: Matrix,
    upper: Matrix,
    columns: NDArray[np.intp],
    scales: Matrix,
    zeros: NDArray[np.int8],
    qmin: int,
    qmax: int,
    errors: Matrix,
    codes: NDArray[np.int8],
) -> None:
    """Round the places of one block; rows are independent. Overwrites `block`.

    Args:
        block: (rows, places) current weights.
        upper: (places, places) diagonal block of U.
        scales, zeros: (rows, groups).
        errors: (rows, places), out: rounding error over U's diagonal.
        codes: (rows, n), out, by column.
    """
    rows, places = block.shape
    group = codes.shape[1] // scales.shape[1]
    for row in prange(rows):
        weight = block[row]
        for place in range(places):
            g = columns[place] // group
            scale, zero = scales[row, g], np.float64(zeros[row, g])
            level = 0.0
            if scale != 0:
                level = min(max(np.rint(weight[place] / scale), qmin - zero), qmax - zero)
            codes[row, columns[place]] = np.int8(level + zero)
            error = errors.dtype.type((weight[place] - level * scale) / upper[place, place])
            errors[row, place] = error
            for later in range(place + 1, places):
                weight[later] -= error * upper[place, later]
