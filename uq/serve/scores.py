"""Logarithms of probabilities over the whole vocabulary."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from uq.serve.job import Score


def score(logits: NDArray[np.float32], token: int, count: int) -> Score:
    """The token's own logarithm and the `count` greatest.

    Args:
        logits: (vocab,) float32.
    """
    peak = logits.max()
    log_sum = float(peak) + float(np.log(np.exp(logits - peak).sum(dtype=np.float64)))
    top = greatest(logits, count)
    listed = tuple((index, float(logits[index]) - log_sum) for index in top)
    return Score(token, float(logits[token]) - log_sum, listed)


def greatest(logits: NDArray[np.float32], count: int) -> list[int]:
    """Indices of the `count` greatest, falling; of equal ones the smaller index first."""
    if count == 0:
        return []
    border = np.partition(logits, logits.size - count)[logits.size - count]
    near = np.flatnonzero(logits >= border)
    order = np.argsort(-logits[near], kind="stable")
    chosen: list[int] = near[order][:count].tolist()
    return chosen
