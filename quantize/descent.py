"""Coordinate descent on the codes: what GPTQ's one pass over the columns leaves to gain.

With the weights w of a row, their target t and the Hessian H, the output error (t - w) H (t - w)^T
changes with one code k of column j as a parabola whose lowest point is r_j / H_jj away from it,
r = (t - w) H. Each step moves a code to the grid point next to that lowest point.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import numpy as np
from numba import njit, prange
from numpy.typing import NDArray

from uq.formats.spec import QuantTensor

SWEEPS = 3  # over all columns

Floats = TypeVar("Floats", np.float32, np.float64)


@contextmanager
def damped(hessian: NDArray[Floats], damping: float) -> Iterator[None]:
    """Within, the diagonal is larger by `damping`, in units of its mean."""
    diagonal = np.einsum("ii->i", hessian)
    kept = diagonal.copy()
    diagonal += damping * kept.mean()
    try:
        yield
    finally:
        diagonal[:] = kept


def descend(
    target: NDArray[Floats], tensor: QuantTensor, hessian: NDArray[Floats]
) -> NDArray[np.int8]:
    """Codes (rows, n) with an output error no larger than the tensor's; scales are kept.

    Args:
        target: (rows, n); hessian: (n, n). What is computed has their type.
    """
    spec, scales = tensor.spec, tensor.scales.astype(hessian.dtype)
    slope = (target - tensor.dequantize()) @ hessian
    codes = tensor.codes.copy()
    curvature = np.ascontiguousarray(np.diagonal(hessian))
    _sweep(slope, hessian, curvature, scales, spec.qmin, spec.qmax, codes)
    return codes


@njit(nogil=True, parallel=True, cache=True)
def _sweep(
    slope: NDArray[Floats],
    hessian: NDArray[Floats],
    curvature: NDArray[Floats],
    scales: NDArray[Floats],
    qmin: int,
    qmax: int,
    codes: NDArray[np.int8],
) -> None:
    """Rows are independent. Overwrites `slope` (rows, n) and `codes` (rows, n)."""
    rows, n = codes.shape
    group = n // scales.shape[1]
    for row in prange(rows):
        for step in range(SWEEPS * n):
            col = step % n
            scale = scales[row, col // group]
            if scale == 0:
                continue
            code = np.float64(codes[row, col])
            wish = code + np.rint(slope[row, col] / (curvature[col] * scale))
            wish = min(max(wish, np.float64(qmin)), np.float64(qmax))
            if wish != code:
                codes[row, col] = np.int8(wish)
                moved = slope.dtype.type((wish - code) * scale)
                for other in range(n):
                    slope[row, other] -= moved * hessian[col, other]
