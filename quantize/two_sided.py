"""Codes and scales under the error of all outputs together, weighed by the model's curvature.

With E what a weight misses of its target, H the moments of its inputs and O the curvature of its
outputs, the loss is tr(O E H E^T). For one row alone this is what `descent.py` and `refit.py` make
small; O couples the rows, so that errors of some rows can cancel those of others (Tseng et al.,
"Model-Preserving Adaptive Rounding", 2025).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
from numba import njit
from numpy.typing import NDArray

from uq.formats.spec import QuantTensor
from uq.quantize.descent import damped
from uq.quantize.factor import Factor, Matrix, factorize
from uq.quantize.plan import GptqOptions
from uq.quantize.refit import system_diagonal
from uq.quantize.scales import stacked, stored_scales

Array = NDArray[np.float32]

ROUNDS, SWEEPS = 2, 2  # of coordinate descent and refit; sweeps over all columns in each
ROWS = 16  # rounded before what they miss moves the rows behind them
DESCENTS = 1  # of these rows alone; all rows together follow
STEPS = 3  # of conjugate gradients in a refit
COLUMNS = 64  # whose slopes are brought up to date together


def round_together(
    target: Matrix,
    hessian: Array,
    outputs: Array,
    round_rows: Callable[[Matrix], QuantTensor],
    options: GptqOptions,
) -> QuantTensor:
    """Round a weight so that the loss of all its rows together is small.

    Args:
        target: (rows, n); hessian: (n, n) H; outputs: (rows, rows) O.
        round_rows: rounds some rows, each for itself.
    """
    factor = factorize(outputs, options.outputs or 0.0)
    if factor is None:
        return round_rows(target)
    found = _feed_back(target, factor, round_rows)
    if not np.isfinite(found.scales).all():  # the caller refuses the weight
        return found
    goal = target.astype(np.float32, copy=False)
    mean = np.float32(np.diagonal(outputs).mean() * (options.outputs or 0.0))
    return refine(
        goal, found, hessian, outputs + mean * np.eye(len(outputs), dtype=np.float32), options
    )


def _feed_back(
    target: Matrix, factor: Factor, round_rows: Callable[[Matrix], QuantTensor]
) -> QuantTensor:
    """GPTQ across the rows: what some rows miss moves the targets of the rows still to come.

    Args:
        factor: of the damped curvature of the outputs.
    """
    left, upper = target[factor.order], factor.upper.astype(target.dtype)
    parts = []
    for start in range(0, len(left), ROWS):
        here, later = slice(start, start + ROWS), slice(start + ROWS, None)
        parts.append(round_rows(left[here]))
        missed = left[here] - parts[-1].dequantize()
        left[later] -= upper[here, later].T @ np.linalg.solve(upper[here, here].T, missed)
    found, places = stacked(parts), np.argsort(factor.order)
    zeros = None if found.zeros is None else found.zeros[places]
    return QuantTensor(found.codes[places], found.scales[places], found.spec, zeros)


def refine(
    target: Array, tensor: QuantTensor, hessian: Array, outputs: Array, options: GptqOptions
) -> QuantTensor:
    """The tensor with codes and scales of a smaller loss.

    Args:
        target: (rows, n); hessian: (n, n) H; outputs: (rows, rows) O, damped.
    """
    with damped(hessian, options.damping):
        for _ in range(ROUNDS):
            for _ in range(SWEEPS):
                tensor = swept(target, tensor, hessian, outputs)
            if options.refit:
                tensor = refitted(target, tensor, hessian, outputs)
    return tensor


def loss(target: Array, tensor: QuantTensor, hessian: Array, outputs: Array) -> float:
    """tr(O E H E^T)."""
    missed = target - tensor.dequantize()
    return float(np.vdot(outputs @ missed, missed @ hessian))


def swept(target: Array, tensor: QuantTensor, hessian: Array, outputs: Array) -> QuantTensor:
    """Every code in turn moved to the grid point next to the lowest point of its parabola."""
    spec, scales = tensor.spec, tensor.scales.astype(np.float32)
    missed, codes = target - tensor.dequantize(), tensor.codes.copy()
    for start in range(0, target.shape[1], COLUMNS):
        here = slice(start, start + COLUMNS)
        slope = np.ascontiguousarray((outputs @ (missed @ hessian[:, here])).T)  # (columns, rows)
        moved = np.zeros_like(slope)
        near = np.ascontiguousarray(hessian[here, here])
        groups = np.arange(start, start + len(slope)) // spec.group
        by_column = np.ascontiguousarray(scales[:, groups].T)
        part = np.ascontiguousarray(codes[:, here].T)
        _sweep(slope, near, outputs, by_column, spec.qmin, spec.qmax, part, moved)
        codes[:, here] = part.T
        missed[:, here] -= moved.T
    return replace(tensor, codes=codes)


@njit(nogil=True, cache=True)
def _sweep(
    slope: Array,
    hessian: Array,
    outputs: Array,
    scales: Array,
    qmin: int,
    qmax: int,
    codes: NDArray[np.int8],
    moved: Array,
) -> None:
    """Some columns, row by row; overwrites `slope` and `codes`.

    Args:
        slope: (columns, rows) of O E H.
        hessian: (columns, columns); outputs: (rows, rows).
        scales, codes: (columns, rows).
        moved: (columns, rows) of zeros, out: what the weights change by.
    """
    columns, rows = slope.shape
    change = np.empty(rows, np.float32)  # of O times the column's errors
    for col in range(columns):
        change[:] = 0
        curvature = hessian[col, col]
        for row in range(rows):
            scale = scales[col, row]
            if scale == 0:
                continue
            code = np.float32(codes[col, row])
            left = slope[col, row] - curvature * change[row]
            wish = code + np.rint(left / (curvature * outputs[row, row] * scale))
            wish = min(max(wish, np.float32(qmin)), np.float32(qmax))
            if wish != code:
                codes[col, row] = np.int8(wish)
                step = (wish - code) * scale
                moved[col, row] = step
                for other in range(rows):
                    change[other] += step * outputs[row, other]
        for later in range(col + 1, columns):
            coupling = hessian[col, later]
            for row in range(rows):
                slope[later, row] -= coupling * change[row]


def refitted(target: Array, tensor: QuantTensor, hessian: Array, outputs: Array) -> QuantTensor:
    """Scales after some steps of conjugate gradients towards the least loss with these codes."""
    rows, n = target.shape
    levels = tensor.levels().astype(np.float32).reshape(rows, -1, tensor.spec.group)
    scales = tensor.scales.astype(np.float32)

    def weight(scales: Array) -> Array:
        return (levels * scales[:, :, None]).reshape(rows, n)

    def slope(missed: Array) -> Array:
        bent = outputs @ (missed @ hessian)
        found: Array = np.einsum("rgi,rgi->rg", bent.reshape(levels.shape), levels)
        return found

    diagonal = system_diagonal(levels, hessian) * np.diagonal(outputs)[:, None]
    diagonal += np.float32(1e-6) * diagonal.mean() + np.float32(1e-30)
    left = slope(target - weight(scales))
    direction = left / diagonal
    size = float(np.vdot(left, direction))
    for _ in range(STEPS):
        bent = slope(weight(direction))
        step = np.float32(size / max(float(np.vdot(direction, bent)), 1e-30))
        scales += step * direction
        left -= step * bent
        ahead = left / diagonal
        before, size = max(size, 1e-30), float(np.vdot(left, ahead))
        direction = ahead + np.float32(size / before) * direction
    return replace(tensor, scales=stored_scales(scales.astype(np.float16), tensor.spec))
