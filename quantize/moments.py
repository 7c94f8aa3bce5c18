"""Second moments of the inputs of a linear, and of the errors that it can make up for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from uq.quantize.gptq import Matrix, Statistics

Array = NDArray[np.float32]
# Of a norm's mean squared gain, where gains are divided by: a channel that the norm all but removes
# from the residual stream cannot correct it.
GAIN_RIDGE = 0.1


@dataclass(frozen=True)
class Inputs:
    """A batch of tokens in front of a linear.

    Attributes:
        x: (tokens, n) on the quantized path.
        exact: (tokens, n) on the floating-point path, when it is followed.
        weight: (tokens, 1) how much each token counts; all alike when None.
        wanted: (tokens, rows) what the outputs should change by, of a linear of its own.
    """

    x: Array
    exact: Array | None = None
    weight: Array | None = None
    wanted: Array | None = None


def statistics(batches: Sequence[Inputs]) -> Statistics:
    """Weighted means over the tokens: products in float32, sums over the batches in float64."""
    hessian, cross, wanted = Mean(), Mean(), Mean()
    for batch in batches:
        count = float(len(batch.x)) if batch.weight is None else _sum(batch.weight)
        root = None if batch.weight is None else np.sqrt(batch.weight)
        x = _weighted(batch.x, root)
        hessian.add(x.T @ x, count)
        if batch.exact is not None:
            cross.add(_weighted(batch.exact - batch.x, root).T @ x, count)
        if batch.wanted is not None:
            wanted.add(_weighted(batch.wanted, root).T @ x, count)
    return Statistics(hessian.value(), cross.found(), wanted.found())


class Mean:
    """Running mean of matrices: float64 sum over total weight."""

    def __init__(self) -> None:
        self._sum: Matrix | None = None
        self._count = 0.0

    def add(self, product: Array, count: float) -> None:
        self._sum = product.astype(np.float64) if self._sum is None else self._sum + product
        self._count += count

    def found(self) -> Matrix | None:
        return None if self._sum is None else self._sum / self._count

    def value(self) -> Matrix:
        found = self.found()
        assert found is not None
        return found


def token_weights(sizes: Sequence[Array], clip: float) -> list[Array]:
    """(tokens, 1) per batch: inverse of each output's mean square, the median token's being 1.

    Args:
        sizes: (tokens, 1) per batch, the mean squares.
        clip: bound of the weights and of their inverses.
    """
    median = np.median(np.concatenate(sizes))
    return [
        np.clip(median / np.maximum(size, np.float32(1e-30)), 1 / clip, clip).astype(np.float32)
        for size in sizes
    ]


def mean_square(x: Array) -> Array:
    """(tokens, 1) of (tokens, n)."""
    squares: Array = np.einsum("ti,ti->t", x, x)[:, None] / np.float32(x.shape[1])
    return squares


def undo_norm(error: Array, size: Array, gain: Array) -> Array:
    """What an output must add in front of its norm so that `error` is added behind it.

    Args:
        error: (tokens, rows).
        size: (tokens, 1) mean squares of the output, taken as fixed.
        gain: (rows,) of the norm.
    """
    squared = gain**2
    inverse: Array = gain / (squared + np.float32(GAIN_RIDGE) * squared.mean())
    return error * np.sqrt(size) * inverse


def _weighted(x: Array, root: Array | None) -> Array:
    return x if root is None else x * root


def _sum(weight: Array) -> float:
    return float(weight.sum(dtype=np.float64))
