"""Choice of the next token from logits."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from uq.kernels.session import Sampling


def sample(logits: NDArray[np.float32], sampling: Sampling, position: int) -> int:
    """One token id by temperature, then top-k, then top-p (Holtzman et al., nucleus sampling).

    Args:
        logits: (vocab,) float32.
        position: number of tokens in front of the new one; with the seed it determines the
            random number.

    Returns:
        The id; of equal logits the smallest id counts as the greatest.
    """
    if sampling.temperature == 0:
        return int(logits.argmax())
    ids, probabilities = candidates(logits, sampling)
    cumulative = probabilities.cumsum()
    drawn = uniform(sampling.seed, position) * cumulative[-1]
    index = np.searchsorted(cumulative, drawn, side="right")
    return int(ids[min(index, ids.size - 1)])  # the product may round up to the last sum


def candidates(
    logits: NDArray[np.float32], sampling: Sampling
) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
    """Ids that can be drawn, rising, and their probabilities, which sum to 1."""
    ids = greatest(logits, sampling.top_k or logits.size)
    exact = logits[ids].astype(np.float64)
    with np.errstate(over="ignore"):  # the rest of a tiny temperature has no weight
        weights = np.exp((exact - exact.max()) / sampling.temperature)
    probabilities = weights / weights.sum()
    if sampling.top_p >= 1:
        return ids, probabilities
    kept = np.sort(nucleus(probabilities, sampling.top_p))
    return ids[kept], probabilities[kept] / probabilities[kept].sum()


def greatest(values: NDArray[np.float32], count: int) -> NDArray[np.intp]:
    """Rising indices of the `count` greatest values; of equal ones the first."""
    if count >= values.size:
        return np.arange(values.size)
    border = np.partition(values, values.size - count)[values.size - count]
    above = np.flatnonzero(values > border)
    equal = np.flatnonzero(values == border)[: count - above.size]
    return np.sort(np.concatenate([above, equal]))


def nucleus(probabilities: NDArray[np.float64], top_p: float) -> NDArray[np.intp]:
    """Indices of the fewest greatest probabilities that reach `top_p` together."""
    # All those under this bound sum to less than 1 - top_p: never needed, so never sorted.
    bound = (1 - top_p) / probabilities.size
    likely = np.flatnonzero(probabilities >= bound)
    order = likely[np.argsort(-probabilities[likely], kind="stable")]
    reached = int(np.searchsorted(probabilities[order].cumsum(), top_p))
    return order[: reached + 1]


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that depends on seed and position alone.

    Philox4x64 (Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3): the seed is its key,
    the position the upper half of its counter.
    """
    generator = np.random.Philox(key=seed % 2**128, counter=position << 128)
    return float(np.random.Generator(generator).random())
