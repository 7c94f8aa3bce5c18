"""Second moments of the inputs of a linear, and of the errors that it can make up for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from uq.quantize.factor import Matrix
from uq.quantize.gptq import Statistics
from uq.quantize.plan import WorkSizes

Array = NDArray[np.float32]
# Of a norm's mean squared gain, where gains are divided by: a channel that the norm all but removes
# from the residual stream cannot correct it.
GAIN_RIDGE = 0.1
WIDE = 8192  # channels
DEFAULT = WorkSizes()


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


def statistics(batches: Iterable[Inputs], work: WorkSizes = DEFAULT) -> Statistics:
    """Weighted means over the tokens: products in float32, their sums as `Mean` takes them."""
    hessian, cross, wanted = (Mean(work.double_width) for _ in range(3))
    for batch in batches:
        count = float(len(batch.x)) if batch.weight is None else _sum(batch.weight)
        root = None if batch.weight is None else np.sqrt(batch.weight)
        x = _weighted(batch.x, root)
        hessian.add(x, x, count)
        if batch.exact is not None:
            cross.add(_weighted(batch.exact - batch.x, root), x, count)
        if batch.wanted is not None:
            wanted.add(_weighted(batch.wanted, root), x, count)
    total = hessian.finish()
    assert total is not None
    return Statistics(total, cross.finish(), wanted.finish(), row_numbers=work.row_numbers)


class Mean:
    """Running mean of left^T right: the sum over the total weight.

    For inputs of up to `double_width` channels in float64. Beyond, where matrices take gigabytes,
    in float32, and by strips beyond `WIDE`: the rounding of the sum is then a few 1e-7 of the
    largest entry, that of the damping 1e-2 of the mean diagonal.
    """

    def __init__(self, double_width: int) -> None:
        self._double_width = double_width
        self._sum: Matrix | None = None
        self._count = 0.0
        self._symmetric = False

    def add(self, left: Array, right: Array, count: float) -> None:
        """left: (tokens, rows), right: (tokens, n); the same array for a symmetric mean."""
        rows, n = left.shape[1], right.shape[1]
        self._symmetric = left is right
        if self._sum is None:
            kind = np.float64 if n <= self._double_width else np.float32
            self._sum = np.zeros((rows, n), kind)
        for strip in _strips(rows, n):
            first = strip.start if self._symmetric else 0
            self._sum[strip, first:] += left[:, strip].T @ right[:, first:]
        self._count += count

    def finish(self) -> Matrix | None:
        """The mean, once; None when nothing was added."""
        if self._sum is None:
            return None
        self._sum /= self._count
        if self._symmetric:
            for strip in _strips(*self._sum.shape):
                self._sum[strip.stop :, strip] = self._sum[strip, strip.stop :].T
                if strip != slice(0, len(self._sum)):  # BLAS knows that the whole is symmetric
                    square = self._sum[strip, strip]
                    square[:] = np.triu(square) + np.triu(square, 1).T
        return self._sum


def _strips(rows: int, n: int) -> Iterator[slice]:
    """All rows at once of what is at most `WIDE` wide."""
    step = max(1, WIDE**2 // n) if n > WIDE else rows
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


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
