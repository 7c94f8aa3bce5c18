"""Products with weights that stay in float32, each a sum over one row in a fixed order.

What a token gets depends on no other token, nor on the number of threads, as BLAS's would.
"""

from __future__ import annotations

import numpy as np
from numba import prange
from numpy.typing import NDArray

from uq.kernels.elementwise import FAST, kernel

Array = NDArray[np.float32]

SMALL = 1 << 14  # weights below this are multiplied before the other threads have woken up


@kernel(parallel=True, fastmath=FAST)
def _on_all_threads(x: Array, weight: Array, out: Array) -> None:
    for row in prange(weight.shape[0]):
        _one_row(x, weight, row, out)


@kernel(fastmath=FAST)
def _on_one_thread(x: Array, weight: Array, out: Array) -> None:
    for row in range(weight.shape[0]):
        _one_row(x, weight, row, out)


@kernel(fastmath=FAST)
def _one_row(x: Array, weight: Array, row: int, out: Array) -> None:
    for token in range(x.shape[0]):
        total = np.float32(0.0)
        for i in range(weight.shape[1]):
            total += x[token, i] * weight[row, i]
        out[token, row] = total


def float_linear(x: Array, weight: Array, out: Array) -> None:
    """out (tokens, rows) = x (tokens, n) weight (rows, n)^T, all float32."""
    (_on_one_thread if weight.size < SMALL else _on_all_threads)(x, weight, out)


def multiplied(x: Array, weight: Array) -> Array:
    """`float_linear` into a new array."""
    out = np.empty((len(x), len(weight)), np.float32)
    float_linear(np.ascontiguousarray(x), weight, out)
    return out
