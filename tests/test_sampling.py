"""Sampling against the definitions, computed the long way, and against exact distributions."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from uq.kernels.sampling import candidates, sample, uniform
from uq.kernels.session import Sampling

RNG = np.random.default_rng(0)
LOGITS = (RNG.standard_normal(50) * 2).astype(np.float32)
VOCABULARY = (RNG.standard_normal(262_144) * 3).astype(np.float32)
SETTINGS = {
    "plain": Sampling(temperature=1.0),
    "hot": Sampling(temperature=3.5),
    "top-k": Sampling(temperature=0.8, top_k=7),
    "top-p": Sampling(temperature=1.2, top_p=0.7),
    "top-k, then top-p": Sampling(temperature=1.5, top_k=20, top_p=0.6),
    "top-p of one token": Sampling(temperature=1.0, top_p=1e-9),
    "top-k of one token": Sampling(temperature=1.0, top_k=1),
    "top-k beyond the vocabulary": Sampling(temperature=1.0, top_k=10**6, top_p=0.99),
}


def probabilities(logits: NDArray[np.float32], sampling: Sampling) -> NDArray[np.float64]:
    """Twin: sort everything, cut by the definitions, one id after the other."""
    order = sorted(range(logits.size), key=lambda i: -logits[i])
    kept = order[: sampling.top_k] if sampling.top_k else order
    weights = np.exp(logits[kept].astype(np.float64) / sampling.temperature)
    weights /= weights.sum()
    out = np.zeros(logits.size)
    total = 0.0
    for index, weight in zip(kept, weights, strict=True):
        if sampling.top_p < 1 and total >= sampling.top_p:
            break
        out[index] = weight
        total += weight
    normalised: NDArray[np.float64] = out / out.sum()
    return normalised


@pytest.mark.parametrize("sampling", SETTINGS.values(), ids=SETTINGS.keys())
@pytest.mark.parametrize("logits", [LOGITS, VOCABULARY], ids=["small", "vocabulary"])
def test_candidates_follow_the_definitions(logits: NDArray[np.float32], sampling: Sampling) -> None:
    expected = probabilities(logits, sampling)
    ids, found = candidates(logits, sampling)
    actual = np.zeros(logits.size)
    actual[ids] = found
    assert set(ids) == set(np.flatnonzero(expected))
    np.testing.assert_allclose(actual, expected, rtol=1e-9)


@pytest.mark.parametrize("sampling", SETTINGS.values(), ids=SETTINGS.keys())
def test_draws_follow_the_probabilities(sampling: Sampling) -> None:
    """Pearson's chi-square over 5,000 draws, within five standard deviations of its mean."""
    draws = 5_000
    expected = probabilities(LOGITS, sampling) * draws
    counts = np.bincount([sample(LOGITS, sampling, p) for p in range(draws)], minlength=50)
    possible = expected > 0
    assert counts[~possible].sum() == 0
    chi_square = ((counts - expected)[possible] ** 2 / expected[possible]).sum()
    freedom = possible.sum() - 1
    assert chi_square <= freedom + 5 * np.sqrt(2 * freedom)


def test_zero_temperature_takes_the_greatest_logit() -> None:
    greedy = Sampling(temperature=0.0, top_k=3, top_p=0.1, seed=9)
    assert sample(VOCABULARY, greedy, 0) == int(VOCABULARY.argmax())


def test_first_of_equal_logits_survives_top_k() -> None:
    equal = np.array([0, 1, 2, 1, 1], np.float32)
    ids, _ = candidates(equal, Sampling(temperature=1.0, top_k=2))
    assert sorted(ids.tolist()) == [1, 2]


def test_small_temperature_does_not_overflow() -> None:
    assert sample(VOCABULARY * 100, Sampling(temperature=1e-6), 5) == int(VOCABULARY.argmax())


def test_random_number_depends_on_seed_and_position_alone() -> None:
    forwards = [uniform(7, position) for position in range(20)]
    backwards = [uniform(7, position) for position in reversed(range(20))]
    assert forwards == backwards[::-1]
    assert len({*forwards, *(uniform(8, position) for position in range(20))}) == 40


def test_random_numbers_of_one_seed_are_uniform() -> None:
    """Kolmogorov and Smirnov: the greatest gap stays under 1.95 / sqrt(n) (p = 0.001)."""
    drawn = np.sort([uniform(1, position) for position in range(4_000)])
    gap = np.abs(drawn - (np.arange(4_000) + 0.5) / 4_000).max()
    assert gap < 1.95 / np.sqrt(4_000)


def test_negative_seed_is_a_seed_like_any_other() -> None:
    assert 0 <= uniform(-1, 0) < 1


@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_a_temperature_of_nearly_nothing_takes_the_likeliest(top_p: float) -> None:
    sampling = Sampling(temperature=5e-324, top_p=top_p)
    assert sample(LOGITS, sampling, 3) == LOGITS.argmax()
    assert np.isfinite(candidates(LOGITS, sampling)[1]).all()
