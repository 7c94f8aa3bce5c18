"""The damped Hessian of GPTQ, factorized: Cholesky by halves, in place, in the Hessian's own type.

The widest Hessian of Gemma 3 27B takes 1.85 GB in float32, so no step here holds more than two
matrices of that size and half of one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

BLOCK = 128  # columns that are taken off in one step while only the diagonal is wanted
STRIP_NUMBERS = 1 << 26  # of a matrix, that are computed in one product
ESCALATION = (1.0, 10.0, 100.0)  # of the damping, while the Hessian is not positive definite
DIAGONAL_FLOOR = 1e-6  # of the largest diagonal entry, in the last attempt
CHOLESKY_BASE = 64
SWAP = 1 << 20  # numbers that change places in one step

Matrix = NDArray[np.floating[Any]]  # float64, or float32 where it is wide


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
        left[self.order] = np.diagonal(self.upper).astype(np.float64) ** -2
        return left

    def solve(self, goal: Matrix) -> Matrix:
        """(rows, n): goal (H + damping)^-1."""
        by_place = goal[:, self.order]
        solution = np.empty_like(by_place)
        solution[:, self.order] = (by_place @ self.upper.T) @ self.upper
        return solution


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
            inverse_cholesky(damped)
        except np.linalg.LinAlgError:
            continue
        if _finite(damped):
            _reverse(damped)
            return Factor(order, damped)
    return None


def unusable(hessian: Matrix) -> str:
    """Why `factorize` found no factor of a matrix of second moments."""
    if not _finite(hessian):
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


def inverse_cholesky(matrix: Matrix) -> None:
    """Overwrite a positive definite (n, n) matrix L L^T by L^-1.

    By halves, all in products: unlike LAPACK's threaded factorization these sum in the same order
    at any number of threads.

    Raises:
        numpy.linalg.LinAlgError: the matrix is not positive definite.
    """
    n = len(matrix)
    if n <= CHOLESKY_BASE:
        matrix[:] = np.tril(np.linalg.inv(np.linalg.cholesky(matrix)))
        return
    half = n // 2
    top, corner, bottom = matrix[:half, :half], matrix[half:, :half], matrix[half:, half:]
    inverse_cholesky(top)
    side = corner @ top.T  # L's lower left
    bottom -= side @ side.T
    inverse_cholesky(bottom)
    side = bottom @ side
    np.matmul(np.negative(side, out=side), top, out=corner)
    matrix[:half, half:] = 0


def cholesky_diagonal(matrix: Matrix) -> NDArray[np.float64]:
    """(n,) diagonal of L for a positive definite matrix L L^T, which is overwritten.

    Raises:
        numpy.linalg.LinAlgError: the matrix is not positive definite.
    """
    n = len(matrix)
    diagonal = np.empty(n)
    strip = max(BLOCK, STRIP_NUMBERS // n)
    for start in range(0, n, BLOCK):
        stop = min(start + BLOCK, n)
        inverse = matrix[start:stop, start:stop].copy()
        inverse_cholesky(inverse)
        diagonal[start:stop] = 1 / np.diagonal(inverse)
        side = matrix[stop:, start:stop] @ inverse.T  # of L, below the block
        for first in range(stop, n, strip):  # only what lies below the diagonal is read again
            last = min(first + strip, n)
            rows = side[first - stop : last - stop]
            matrix[first:last, stop:last] -= rows @ side[: last - stop].T
    return diagonal


def _damped(hessian: Matrix, damping: float) -> Iterator[tuple[NDArray[np.intp], Matrix]]:
    """Order of the columns, and the damped Hessian by falling place, for each attempt."""
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


def _reverse(matrix: Matrix) -> None:
    """Turn both axes of a C-contiguous matrix around, in place: the numbers in reverse order."""
    flat = matrix.reshape(-1)
    for start in range(0, flat.size // 2, SWAP):
        stop = min(start + SWAP, flat.size // 2)
        front, back = flat[start:stop], flat[flat.size - stop : flat.size - start]
        front[:], back[:] = back[::-1].copy(), front[::-1].copy()


def _finite(matrix: Matrix) -> bool:
    """Without an array of as many truth values."""
    return all(bool(np.isfinite(row).all()) for row in matrix)
