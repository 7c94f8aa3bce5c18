"""The inverse of a Cholesky factor, by halves, all in products (`inverse_cholesky`)."""

from __future__ import annotations

from uq.kernels.vulkan.dense.matrix import TILE, Matrix
from uq.kernels.vulkan.dense.products import Products
from uq.kernels.vulkan.dense.stream import Stream
from uq.kernels.vulkan.memory import Span
from uq.kernels.vulkan.push import addresses, words

BASE = 64
LANES = 256


def inverse_cholesky(
    stream: Stream, products: Products, matrix: Matrix, inverse: Matrix, failed: Span
) -> None:
    """L^-1 of L L^T, of which what lies on and below the diagonal is read, and overwritten.

    Args:
        inverse: zeros above the diagonal, in front.
        failed: becomes 1 when the matrix is not positive definite.
    """
    n = matrix.height
    if n == BASE:
        push = addresses(matrix.span, inverse.span, failed) + words(matrix.stride)
        stream.dispatch("dense_invert", push, (1, 1, 1), {"LANES": LANES})
        return
    half = n // 2 // TILE * TILE or BASE
    rest = n - half
    top, bottom = inverse.block(0, 0, half, half), inverse.block(half, half, rest, rest)
    side, left = inverse.block(half, 0, rest, half), matrix.block(half, 0, rest, half)
    right = matrix.block(half, half, rest, rest)
    inverse_cholesky(stream, products, matrix.block(0, 0, half, half), top, failed)
    products.multiply(side, left, top)  # L's lower left
    products.square(right, side, alpha=-1.0, add=True)
    inverse_cholesky(stream, products, right, bottom, failed)
    products.multiply(left, bottom, side, b_by_k=True)
    products.multiply(side, left, top, alpha=-1.0, b_by_k=True)
