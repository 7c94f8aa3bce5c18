"""Products with weights that stay in float32, each a sum over one row in a fixed order.

What a token gets depends on no other token, nor on the number of threads, as BLAS's would.
"""

from __future__ import annotations

import numpy as np
from numba import prange
from numpy.typing import NDArray

from uq.kernels.elementwise import FAST, kernel

Array = NDArray[np.float32]

ROWS = 4
SMALL = 1 << 14  # weights below this are multiplied before the other threads have woken up


@kernel(parallel=True, fastmath=FAST)
def _on_all_threads(x: Array, weight: Array, out: Array) -> None:
    for block in prange(-(-weight.shape[0] // ROWS)):
        _block(x, weight, block * ROWS, out)


@kernel(fastmath=FAST)
def _on_one_thread(x: Array, weight: Array, out: Array) -> None:
    for block in range(-(-weight.shape[0] // ROWS)):
        _block(x, weight, block * ROWS, out)


@kernel(fastmath=FAST)
def _block(x: Array, weight: Array, row: int, out: Array) -> None:
    """`ROWS` rows together: each number of x is loaded once for all of them."""
    zero, rest = np.float32(0.0), weight.shape[0] - row
    for token in range(x.shape[0]):
        if rest < ROWS:
            for other in range(row, row + rest):
                total = zero
                for i in range(weight.shape[1]):
                    total += x[token, i] * weight[other, i]
                out[token, other] = total
            continue
        a, b, c, d = zero, zero, zero, zero
        for i in range(weight.shape[1]):
            value = x[token, i]
            a += value * weight[row, i]
            b += value * weight[row + 1, i]
            c += value * weight[row + 2, i]
            d += value * weight[row + 3, i]
        out[token, row], out[token, row + 1] = a, b
        out[token, row + 2], out[token, row + 3] = c, d


def float_linear(x: Array, weight: Array, out: Array) -> None:
    """out (tokens, rows) = x (tokens, n) weight (rows, n)^T, all float32."""
    (_on_one_thread if weight.size < SMALL else _on_all_threads)(x, weight, out)


def multiplied(x: Array, weight: Array) -> Array:
    """`float_linear` into a new array."""
    out = np.empty((len(x), len(weight)), np.float32)
    float_linear(np.ascontiguousarray(x), weight, out)
    return out
