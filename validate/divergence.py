"""Sums over the vocabulary, taken block by block, from which all scores follow."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from uq.kernels.elementwise import FAST, exp32, kernel, row_peak
from uq.validate.scores import Scores


class Sums:
    """Running sums over the vocabulary for a block of positions, (2, n) where both models have one.

    Row 0 is the reference, row 1 the model. `mass` is sum exp(l - peak) and `cross` is
    sum exp(l0 - peak0) (l0 - l1), both relative to the greatest logit so far (Milakov and
    Gimelshein, Online normalizer calculation for softmax).
    """

    def __init__(self, target: NDArray[np.int32]) -> None:
        n = target.size
        self.target = target
        self.peak = np.full((2, n), -np.inf)
        self.mass = np.zeros((2, n))
        self.top = np.zeros((2, n), np.int64)
        self.chosen = np.zeros((2, n))
        self.cross = np.zeros(n)

    def add(self, reference: NDArray[np.float32], model: NDArray[np.float32], start: int) -> None:
        """Take in the logits of vocabulary entries from `start` on, (n, entries) each."""
        logits = (reference, model)
        rows = np.flatnonzero((start <= self.target) & (self.target < start + model.shape[1]))
        for who in (0, 1):
            self.chosen[who, rows] = logits[who][rows, self.target[rows] - start]
        add_block(reference, model, start, self.peak, self.mass, self.top, self.cross)

    def scores(self) -> Scores:
        """KL = sum p0 (l0 - l1) - (log Z0 - log Z1)."""
        log_sum = self.peak + np.log(self.mass)  # (2, n)
        nll = log_sum - self.chosen
        kld = self.cross / self.mass[0] - (log_sum[0] - log_sum[1])
        return Scores(
            nll=nll[1],
            nll_reference=nll[0],
            kld=np.maximum(kld, 0.0),  # rounding can take an equal pair below zero
            same_top=self.top[0] == self.top[1],
            delta_p=np.exp(-nll[1]) - np.exp(-nll[0]),
        )


@kernel(fastmath=FAST)
def add_block(
    reference: NDArray[np.float32],
    model: NDArray[np.float32],
    start: int,
    peak: NDArray[np.float64],
    mass: NDArray[np.float64],
    top: NDArray[np.int64],
    cross: NDArray[np.float64],
) -> None:
    """Update the arrays of `Sums` with one block of logits, (n, entries) float32 each."""
    n, entries = reference.shape
    for row in range(n):
        logits0, logits1 = reference[row], model[row]
        shrink = raise_peak(logits0, start, peak[0], top[0], row)
        mass[0, row] *= shrink
        cross[row] *= shrink
        mass[1, row] *= raise_peak(logits1, start, peak[1], top[1], row)
        peak0, peak1 = np.float32(peak[0, row]), np.float32(peak[1, row])
        sum0, sum1, sum_cross = 0.0, 0.0, 0.0
        for i in range(entries):
            weight = np.float64(exp32(logits0[i] - peak0))
            sum0 += weight
            sum1 += np.float64(exp32(logits1[i] - peak1))
            sum_cross += weight * np.float64(logits0[i] - logits1[i])
        mass[0, row] += sum0
        mass[1, row] += sum1
        cross[row] += sum_cross


@kernel(fastmath={"contract"})
def raise_peak(
    logits: NDArray[np.float32],
    start: int,
    peak: NDArray[np.float64],
    top: NDArray[np.int64],
    row: int,
) -> np.float64:
    """Move a position's peak up to its greatest logit; returns the factor for its old sums."""
    old, new = peak[row], np.float64(row_peak(logits))
    if new <= old:
        return np.float64(1.0)
    peak[row] = new
    for i in range(logits.size):
        if logits[i] == new:
            top[row] = start + i
            break
    shrink: np.float64 = np.exp(old - new)
    return shrink
