"""Least-squares refit of the scales once the codes are known."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from uq.quantize.descent import Floats

REFIT_NUMBERS = 1 << 23  # floats in work at once, about
REFIT_RIDGE = 1e-3


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
