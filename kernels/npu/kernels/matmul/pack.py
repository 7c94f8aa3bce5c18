"""Operands of any size as the design takes them: zeros up to its multiples add nothing."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from uq.errors import UsageError
from uq.kernels.npu.kernels.matmul.design import STRIPE, TILE, Shape


def padded(
    a: NDArray[np.int8], b: NDArray[np.int8]
) -> tuple[Shape, NDArray[np.int8], NDArray[np.int8]]:
    """The smallest shape that holds A (m, k) and B (k, n), and both with zeros up to it.

    Raises:
        UsageError: the inner sizes differ, or there is no design of that shape.
    """
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[0]:
        raise UsageError(f"matmul: A {a.shape} and B {b.shape} do not fit; B has a row for each k")
    (m, k), n = a.shape, b.shape[1]
    shape = Shape(_up(m, TILE), _up(k, TILE), _up(n, STRIPE))
    wide = np.zeros((shape.m, shape.k), np.int8)
    tall = np.zeros((shape.k, shape.n), np.int8)
    wide[:m, :k], tall[:k, :n] = a, b
    return shape, wide, tall


def _up(size: int, unit: int) -> int:
    return -(-size // unit) * unit
