"""Second moments of the inputs of a linear, and of the errors that it can make up for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import reduce

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
        lost: (tokens, rows) what the outputs would have to add to make up for the error of the
            residual stream; None where they do not join it.
    """

    x: Array
    exact: Array | None
    weight: Array | None = None
    lost: Array | None = None


def statistics(batches: Sequence[Inputs]) -> Statistics:
    """Weighted means over the tokens of all batches: products in float32, sums in float64."""

    def mean(left: Callable[[Inputs], Array]) -> Matrix:
        return _sum(left(batch).T @ _weighted(batch) for batch in batches) / total

    total = sum(float(_weight(batch).sum(dtype=np.float64)) for batch in batches)
    first = batches[0]
    return Statistics(
        hessian=mean(lambda batch: batch.x),
        cross=None if first.exact is None else mean(_shift),
        residual=None if first.lost is None else mean(_lost),
    )


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


def _shift(batch: Inputs) -> Array:
    assert batch.exact is not None
    return batch.exact - batch.x


def _lost(batch: Inputs) -> Array:
    assert batch.lost is not None
    return batch.lost


def _weight(batch: Inputs) -> Array:
    return np.ones((len(batch.x), 1), np.float32) if batch.weight is None else batch.weight


def _weighted(batch: Inputs) -> Array:
    return batch.x if batch.weight is None else batch.x * batch.weight


def _sum(products: Iterable[Array]) -> Matrix:
    total: Matrix = reduce(np.add, (product.astype(np.float64) for product in products))
    return total
