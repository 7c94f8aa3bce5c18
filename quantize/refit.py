"""Least-squares refit of the scales once the codes are known."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from uq.quantize.descent import Floats

REFIT_NUMBERS = 1 << 23  # weights whose scales are refitted at once, about
REFIT_RIDGE = 1e-3
STEPS = 6  # of conjugate gradients; eight left 2e-3 at most of the 270M's gain
LEAST = 1e-30


def refit_scales(
    target: NDArray[Floats],
    levels: NDArray[np.int8],
    scales: NDArray[np.float16],
    hessian: NDArray[Floats],
) -> NDArray[np.float16]:
    """Scales that fit the target's outputs best when the codes stay as they are.

    Per row, with L_g the levels (codes less zero points) of group g:
    sum_h (L_g^T H_gh L_h) s_h = L_g^T (H w)_g, with a small ridge towards the old scales, which
    also keeps rows of zero levels solvable. The matrix of no row is made: conjugate gradients from
    the old scales on, preconditioned by the diagonal, take one product with H a step for all rows
    (Golub and Van Loan, Matrix Computations, 11.5).

    Args:
        target: (rows, n), hessian: (n, n); what is computed has their type.
        levels: (rows, n); scales: (rows, groups) float16.

    Returns:
        (rows, groups) float16.
    """
    new = np.empty_like(scales)
    step = max(1, REFIT_NUMBERS // target.shape[1])
    for start in range(0, len(scales), step):
        here = slice(start, start + step)
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
    fitted = scales.astype(hessian.dtype)

    def outputs(scales: NDArray[Floats]) -> NDArray[Floats]:
        """(rows, groups): the system times the scales."""
        return by_group((grouped * scales[:, :, None]).reshape(rows, -1))

    def by_group(weight: NDArray[Floats]) -> NDArray[Floats]:
        return dots(grouped, (weight @ hessian).reshape(grouped.shape))

    diagonal = system_diagonal(grouped, hessian)
    ridge = REFIT_RIDGE * diagonal.mean(axis=1, keepdims=True)
    ridge[ridge == 0] = 1.0
    diagonal += ridge
    left = by_group(target) - outputs(fitted)  # the ridge is towards these scales
    ahead = left / diagonal
    direction, size = ahead, dots(left, ahead)[:, None]
    for _ in range(STEPS):
        bent = outputs(direction) + ridge * direction
        step = size / np.maximum(dots(direction, bent)[:, None], LEAST)
        fitted += step * direction
        left -= step * bent
        ahead = left / diagonal
        before, size = np.maximum(size, LEAST), dots(left, ahead)[:, None]
        direction = ahead + size / before * direction
    return fitted.astype(np.float16)


def system_diagonal(levels: NDArray[Floats], hessian: NDArray[Floats]) -> NDArray[Floats]:
    """(rows, groups): L_g^T H_gg L_g of the levels (rows, groups, group)."""
    found = np.empty(levels.shape[:2], hessian.dtype)
    group = levels.shape[2]
    for g in range(levels.shape[1]):
        here = slice(g * group, (g + 1) * group)
        found[:, g] = dots(levels[:, g] @ hessian[here, here], levels[:, g])
    return found


def dots(left: NDArray[Floats], right: NDArray[Floats]) -> NDArray[Floats]:
    """Scalar products along the last axis."""
    found: NDArray[Floats] = np.einsum("...i,...i->...", left, right)
    return found
