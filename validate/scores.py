"""Per-token scores of a model beside its reference, and what is reported of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from uq.validate.report import Estimate, KldFacts


@dataclass(frozen=True)
class Scores:
    """One value per scored token, float64 (bool for `same_top`), in the order of the text.

    Attributes:
        nll, nll_reference: -log p(next token), in nats.
        kld: KL(reference || model), in nats.
        same_top: both models find the same token most likely.
        delta_p: p(next token) of the model minus that of the reference.
    """

    nll: NDArray[np.float64]
    nll_reference: NDArray[np.float64]
    kld: NDArray[np.float64]
    same_top: NDArray[np.bool_]
    delta_p: NDArray[np.float64]

    @property
    def perplexity(self) -> Estimate:
        return exp_estimate(self.nll)

    @property
    def reference_perplexity(self) -> Estimate:
        return exp_estimate(self.nll_reference)

    @cached_property
    def perplexity_ratio(self) -> Estimate:
        """Model over reference; the error is that of the paired differences."""
        return exp_estimate(self.nll - self.nll_reference)

    @cached_property
    def kld_facts(self) -> KldFacts:
        mean = estimate(self.kld)
        median, p99, p99_9, top = np.percentile(self.kld, (50, 99, 99.9, 100)).tolist()
        return KldFacts(mean.value, mean.stderr, median, p99, p99_9, top)

    @property
    def same_top_percent(self) -> Estimate:
        share = estimate(self.same_top.astype(np.float64))
        return Estimate(100 * share.value, 100 * share.stderr)

    @property
    def mean_delta_p_percent(self) -> Estimate:
        mean = estimate(self.delta_p)
        return Estimate(100 * mean.value, 100 * mean.stderr)

    @property
    def rms_delta_p_percent(self) -> float:
        return float(100 * np.sqrt(np.mean(self.delta_p**2)))


def estimate(values: NDArray[np.float64]) -> Estimate:
    """Mean and its standard error, sqrt(variance / (n - 1)) as llama.cpp has it."""
    variance = values.var()
    return Estimate(float(values.mean()), float(np.sqrt(variance / max(1, values.size - 1))))


def exp_estimate(values: NDArray[np.float64]) -> Estimate:
    """exp of the mean, its error to first order."""
    mean = estimate(values)
    value = float(np.exp(mean.value))
    return Estimate(value, value * mean.stderr)


def join(parts: Sequence[Scores]) -> Scores:
    """One after another."""
    names = [field.name for field in fields(Scores)]
    return Scores(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))
