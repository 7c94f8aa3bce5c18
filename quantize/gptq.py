"""GPTQ: rounding column by column, each column's error spread over the columns still to come.

Frantar et al., "GPTQ" (2022), Algorithm 1, with the scales fixed beforehand (static groups) and the
columns in order of falling importance. Around it, all optional: a damped correction of the weights
towards the outputs of the floating-point path (the idea of Qronos and GPTAQ in closed form) and
towards what the residual stream has lost before; a least-squares refit of the scales once the codes
are known; and coordinate descent on the codes (`descent.py`).

Index spaces: `col` counts a weight's own columns, `place` counts columns in the order of rounding,
`order[place] == col`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from numba import njit, prange
from numpy.typing import NDArray

from uq.formats.spec import QuantTensor, Spec
from uq.quantize.descent import Floats, descend
from uq.quantize.plan import GptqOptions
from uq.quantize.scales import quantize_rtn

BLOCK = 128  # columns rounded before the columns behind them are updated in one product
ESCALATION = (1.0, 10.0, 100.0)  # of the damping, while the Hessian is not positive definite
DIAGONAL_FLOOR = 1e-6  # of the largest diagonal entry, in the last attempt
CHOLESKY_BASE = 64
REFIT_NUMBERS = 1 << 23  # floats in work at once, about
REFIT_RIDGE = 1e-3

Matrix = NDArray[np.float64]


@dataclass(frozen=True)
class Statistics:
    """Second moments of the inputs of one linear, or of several that share them.

    Attributes:
        hessian: (n, n) float64, weighted mean of x x^T over the tokens of the quantized path.
        cross: (n, n) float64, that of (x_float - x) x^T, for linears that share inputs and are
            corrected towards the floating-point path.
        wanted: (rows, n) float64, that of r x^T, with r what the outputs should change by, for a
            linear of its own.
    """

    hessian: Matrix
    cross: Matrix | None
    wanted: Matrix | None = None

    @property
    def importance(self) -> NDArray[np.float32]:
        """(n,) mean square of each input channel."""
        return np.diagonal(self.hessian).astype(np.float32)

    def rescaled(self, scale: NDArray[np.float32]) -> Statistics:
        """Of the inputs divided by `scale`, (n,)."""
        pairs = np.outer(scale, scale).astype(np.float64)
        cross = None if self.cross is None else self.cross / pairs
        wanted = None if self.wanted is None else self.wanted / scale
        return Statistics(self.hessian / pairs, cross, wanted)

    def factorize(self, damping: float) -> FactorizedStatistics | str:
        """As `StageStatistics` asks for it."""
        factor = factorize(self.hessian, damping)
        return unusable(self.hessian) if factor is None else FactorizedStatistics(self, factor)


@dataclass(frozen=True)
class Factor:
    """The damped Hessian, ready for GPTQ.

    Attributes:
        order: (n,) columns by falling diagonal of the Hessian.
        upper: (n, n) U, upper triangular, with (H + damping)^-1 = U^T U, both axes by place.
    """

    order: NDArray[np.intp]
    upper: Matrix

    @property
    def left(self) -> NDArray[np.float64]:
        """(n,) by column, as `left_variances` gives it."""
        left = np.empty(len(self.order))
        left[self.order] = np.diagonal(self.upper) ** -2
        return left

    def solve(self, goal: Matrix) -> Matrix:
        """(rows, n): goal (H + damping)^-1."""
        by_place = goal[:, self.order]
        solution = np.empty_like(by_place)
        solution[:, self.order] = (by_place @ self.upper.T) @ self.upper
        return solution


@dataclass(frozen=True)
class FactorizedStatistics:
    """A `GptqSolver` in main memory."""

    statistics: Statistics
    factor: Factor

    def quantize(
        self, weight: NDArray[np.float32], spec: Spec, options: GptqOptions
    ) -> QuantTensor:
        return quantize_gptq(weight, spec, self.statistics, self.factor, options)

    def output_error(self, weight: NDArray[np.float32], quantized: QuantTensor) -> float:
        return output_error(weight, quantized, self.statistics.hessian)


def factorize(hessian: Matrix, damping: float) -> Factor | None:
    """Order the columns and factorize the damped Hessian's inverse.

    Damping is raised, and at last tiny diagonal entries too, until the factorization exists. A
    channel that was never active stays uncoupled: its weights are rounded to nearest.

    Args:
        damping: in units of the mean of the diagonal.

    Returns:
        None when no attempt succeeds, e.g. because an activation overflowed.
    """
    for order, damped in _damped(hessian, damping):
        # With both axes reversed, H = R R^T with R upper, hence U = R^-1.
        try:
            lower = inverse_cholesky(damped)
        except np.linalg.LinAlgError:
            continue
        if np.isfinite(lower).all():
            return Factor(order, np.ascontiguousarray(lower[::-1, ::-1]))
    return None


def unusable(hessian: Matrix) -> str:
    """Why `factorize` found no factor of a matrix of second moments."""
    if not np.isfinite(hessian).all():
        return "an input of the calibration is not finite"
    if not hessian.any():
        return "every input of the calibration is zero"
    return "the Hessian of the calibration is not positive definite at any damping"


def left_variances(hessian: Matrix, damping: float) -> NDArray[np.float64] | None:
    """(n,) U_jj^-2 by column: what is left of a column's variance given those rounded behind it.

    Much cheaper than `factorize`, which gives the same; None where that does.
    """
    for order, damped in _damped(hessian, damping):
        try:
            pivots = cholesky_diagonal(damped)
        except np.linalg.LinAlgError:
            continue
        if np.isfinite(pivots).all():
            left = np.empty_like(pivots)
            left[order[::-1]] = pivots**2
            return left
    return None


def _damped(hessian: Matrix, damping: float) -> Iterator[tuple[NDArray[np.intp], Matrix]]:
    """The order of rounding and, with both axes reversed, the matrix of each attempt."""
    diagonal = np.diagonal(hessian)
    mean = diagonal.mean()
    if not np.isfinite(mean) or mean <= 0:
        return
    order = np.argsort(-diagonal, kind="stable")
    for attempt, factor in enumerate(ESCALATION, start=1):
        damped = hessian[np.ix_(order[::-1], order[::-1])]
        entries = np.einsum("ii->i", damped)
        if attempt == len(ESCALATION):
            np.maximum(entries, DIAGONAL_FLOOR * diagonal.max(), out=entries)
        entries += factor * damping * mean
        yield order, damped


def quantize_gptq(
    weight: NDArray[np.float32],
    spec: Spec,
    statistics: Statistics,
    factor: Factor,
    options: GptqOptions,
) -> QuantTensor:
    """Quantize one linear.

    Args:
        weight: (rows, n) float32, finite.
        factor: of `statistics.hessian`.
    """
    target = _target(weight.astype(np.float64), statistics, factor, options)
    importance = scale_importance(statistics, factor.left)
    found = quantize_rtn(target.astype(np.float32), spec, importance)
    found = replace(found, codes=_round_columns(target, found, factor))
    if not np.isfinite(found.scales).all():  # the caller refuses the weight
        return found
    goal, hessian = target.astype(np.float32), statistics.hessian.astype(np.float32)
    if options.refit:
        found = _refitted(goal, found, hessian)
    for _ in range(options.descents):
        found = replace(found, codes=descend(goal, found, hessian, options.damping))
        if options.refit:
            found = _refitted(goal, found, hessian)
    return found


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
    target: NDArray[Floats], tensor: QuantTensor, hessian: NDArray[Floats]
) -> QuantTensor:
    return replace(tensor, scales=refit_scales(target, tensor.levels(), tensor.scales, hessian))


def output_error(weight: NDArray[np.float32], quantized: QuantTensor, hessian: Matrix) -> float:
    """Root mean square error of the outputs over their root mean square, on the inputs behind H."""
    moments = hessian.astype(np.float32)
    error = weight - quantized.dequantize()
    energy = float(np.vdot(weight @ moments, weight))
    if energy <= 0:
        return 0.0
    return float(np.sqrt(max(float(np.vdot(error @ moments, error)), 0.0) / energy))


def inverse_cholesky(matrix: Matrix) -> Matrix:
    """L^-1 for a positive definite (n, n) matrix L L^T.

    By halves, all in products: unlike LAPACK's threaded factorization these sum in the same order
    at any number of threads.

    Raises:
        numpy.linalg.LinAlgError: the matrix is not positive definite.
    """
    n = len(matrix)
    if n <= CHOLESKY_BASE:
        inverse: Matrix = np.tril(np.linalg.inv(np.linalg.cholesky(matrix)))
        return inverse
    half = n // 2
    top = inverse_cholesky(matrix[:half, :half])
    side = matrix[half:, :half] @ top.T  # L's lower left
    bottom = inverse_cholesky(matrix[half:, half:] - side @ side.T)
    return np.block([[top, np.zeros((half, n - half))], [-(bottom @ side) @ top, bottom]])


def cholesky_diagonal(matrix: Matrix) -> NDArray[np.float64]:
    """(n,) diagonal of L for a positive definite matrix L L^T, which is overwritten.

    Raises:
        numpy.linalg.LinAlgError: the matrix is not positive definite.
    """
    n = len(matrix)
    diagonal = np.empty(n)
    for start in range(0, n, BLOCK):
        here, rest = slice(start, start + BLOCK), slice(start + BLOCK, n)
        inverse = inverse_cholesky(matrix[here, here])
        diagonal[here] = 1 / np.diagonal(inverse)
        side = matrix[rest, here] @ inverse.T  # of L, below the block
        matrix[rest, rest] -= side @ side.T
    return diagonal


def _round_columns(target: Matrix, grid: QuantTensor, factor: Factor) -> NDArray[np.int8]:
    """Codes (rows, n) on the scales and zero points of `grid`."""
    rows, n = target.shape
    spec, scales = grid.spec, grid.scales.astype(np.float64)
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


@njit(parallel=True, cache=True)
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
            error = (weight[place] - level * scale) / upper[place, place]
            errors[row, place] = error
            for later in range(place + 1, places):
                weight[later] -= error * upper[place, later]


def refit_scales(
    target: NDArray[Floats],
    levels: NDArray[np.int8],
    scales: NDArray[np.float16],
    hessian: NDArray[Floats],
) -> NDArray[np.float16]:
    """Scales that fit the target's outputs best when the codes stay as they are.

    Per row, with L_g the levels (codes less zero points) of group g:
    sum_h (L_g^T H_gh L_h) s_h = L_g^T (H w)_g, with a small ridge towards the old scales, which
    also keeps rows of zero levels solvable.

    Args:
        target: (rows, n), hessian: (n, n); what is computed has their type.
        levels: (rows, n); scales: (rows, groups) float16.

    Returns:
        (rows, groups) float16.
    """
    rows, groups = scales.shape
    new = np.empty_like(scales)
    step = max(1, REFIT_NUMBERS // (groups**2 + 4 * target.shape[1]))
    for start in range(0, rows, step):
        here = slice(start, min(start + step, rows))
        new[here] = _refit_rows(target[here], levels[here], scales[here], hessian)
    return new


def _refit_rows(
    target: NDArray[Floats],
    levels: NDArray[np.int8],
    scales: NDArray[np.float16],
    hessian: NDArray[Floats],
) -> NDArray[np.float16]:
    rows, groups = scales.shape
    grouped = levels.reshape(rows, groups, -1).astype(hessian.dtype)  # (rows, groups, group)
    group = grouped.shape[2]
    system = np.empty((rows, groups, groups), hessian.dtype)
    for g in range(groups):  # the system is symmetric
        moved = grouped[:, g] @ hessian[g * group : (g + 1) * group, g * group :]
        later = grouped[:, g:]  # (rows, groups from g on, group)
        system[:, g, g:] = np.einsum("rhi,rhi->rh", moved.reshape(later.shape), later)
        system[:, g:, g] = system[:, g, g:]
    outputs = (target @ hessian).reshape(grouped.shape)
    goal = np.einsum("rgi,rgi->rg", grouped, outputs)

    old = scales.astype(hessian.dtype)
    diagonal = np.einsum("rgg->rg", system)
    ridge = REFIT_RIDGE * diagonal.mean(axis=1, keepdims=True)
    ridge[ridge == 0] = 1.0
    diagonal += ridge
    fitted = np.linalg.solve(system, (goal + ridge * old)[:, :, None])[:, :, 0]
    return fitted.astype(np.float16)
