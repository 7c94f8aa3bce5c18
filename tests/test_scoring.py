"""Blockwise scores against a twin that holds every logit in float64, and against torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from uq.errors import DeviceError, UsageError
from uq.formats.checkpoint import open_checkpoint
from uq.kernels.reference import ReferenceSession
from uq.progress import SilentProgress
from uq.validate import divergence, scoring
from uq.validate.scores import Scores
from uq.validate.scoring import ReferenceStates, final_states, score, states_key
from uq.validate.text import targets
from uq.validate.validate import ValidateOptions

CONTEXT = 40
WEIGHTS: dict[str, dict[str, int | str]] = {"model.safetensors": {"size": 1, "sha256": "ab"}}

RNG = np.random.default_rng(2)
KNOWN = Scores(
    nll=RNG.gamma(2.0, size=101),
    nll_reference=RNG.gamma(2.0, size=101),
    kld=RNG.gamma(2.0, size=101),
    same_top=np.arange(101) < 75,
    delta_p=RNG.normal(0.01, 0.1, 101),
)


@pytest.fixture(scope="module")
def models(tiny_checkpoint: Callable[..., Path]) -> tuple[ReferenceSession, ReferenceSession]:
    """Two models of unlike weights, heads and soft-caps over one vocabulary: the model under test
    and its reference."""
    caps = {"final_logit_softcapping": 3.0}
    model = tiny_checkpoint(family="gemma2", seed=1, vocab=1301, tied=False, config=caps)
    reference = tiny_checkpoint(family="gemma3", seed=0, vocab=1301, spread=4.0)
    return ReferenceSession(open_checkpoint(model)), ReferenceSession(open_checkpoint(reference))


@pytest.fixture(scope="module")
def windows() -> NDArray[np.int32]:
    return np.random.default_rng(0).integers(0, 1301, (7, CONTEXT), dtype=np.int32)


@pytest.fixture(scope="module")
def scores(models: tuple[ReferenceSession, ReferenceSession], windows: NDArray[np.int32]) -> Scores:
    return score(*models, windows)


@pytest.fixture(scope="module")
def twin(
    models: tuple[ReferenceSession, ReferenceSession], windows: NDArray[np.int32]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Log-probabilities (scored, vocab) of the model and of the reference."""
    model, reference = (log_probabilities(session, windows) for session in models)
    return model, reference


def log_probabilities(session: ReferenceSession, windows: NDArray[np.int32]) -> NDArray[np.float64]:
    hidden = session.score(windows)[:, CONTEXT // 2 : CONTEXT - 1]
    flat = hidden.reshape(-1, hidden.shape[-1])
    logits = session.logits(flat, 0, session.config.vocab_size).astype(np.float64)
    shifted = logits - logits.max(axis=1, keepdims=True)
    result: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return result


def test_negative_log_likelihoods(
    scores: Scores,
    twin: tuple[NDArray[np.float64], NDArray[np.float64]],
    windows: NDArray[np.int32],
) -> None:
    target = targets(windows)[:, None]
    for actual, expected in zip((scores.nll, scores.nll_reference), twin, strict=True):
        nll = -np.take_along_axis(expected, target, axis=1)[:, 0]
        np.testing.assert_allclose(actual, nll, rtol=1e-6)


def test_kl_divergence(
    scores: Scores, twin: tuple[NDArray[np.float64], NDArray[np.float64]]
) -> None:
    model, reference = twin
    expected = (np.exp(reference) * (reference - model)).sum(axis=1)
    np.testing.assert_allclose(scores.kld, expected, rtol=1e-6)


def test_same_top(scores: Scores, twin: tuple[NDArray[np.float64], NDArray[np.float64]]) -> None:
    model, reference = (log.argmax(axis=1) for log in twin)
    np.testing.assert_array_equal(scores.same_top, model == reference)


def test_difference_of_probabilities(
    scores: Scores,
    twin: tuple[NDArray[np.float64], NDArray[np.float64]],
    windows: NDArray[np.int32],
) -> None:
    target = targets(windows)[:, None]
    model, reference = (np.take_along_axis(np.exp(log), target, axis=1)[:, 0] for log in twin)
    np.testing.assert_allclose(scores.delta_p, model - reference, rtol=1e-6, atol=1e-9)


def test_small_divergence_of_nearly_equal_models(
    models: tuple[ReferenceSession, ReferenceSession], windows: NDArray[np.int32]
) -> None:
    """Logits a few thousandths apart: the divergence is a difference of nearly equal sums."""
    _, reference = models
    noise = np.random.default_rng(1).standard_normal((1301, 128)).astype(np.float32)
    near = NoisyHead(reference, noise * 1e-4)
    expected_log = log_probabilities(reference, windows)
    near_log = log_probabilities(near, windows)
    expected = (np.exp(expected_log) * (expected_log - near_log)).sum(axis=1)
    assert expected.mean() < 1e-5
    actual = score(near, reference, windows).kld
    np.testing.assert_allclose(actual, expected, atol=1e-10, rtol=1e-3)


def test_model_against_itself(
    models: tuple[ReferenceSession, ReferenceSession], windows: NDArray[np.int32]
) -> None:
    itself = score(models[0], models[0], windows)
    assert itself.kld.max() <= 1e-12
    assert itself.same_top.all()
    assert not itself.delta_p.any()


def test_block_sizes_do_not_change_scores(
    models: tuple[ReferenceSession, ReferenceSession],
    windows: NDArray[np.int32],
    scores: Scores,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(scoring, "TOKEN_BATCH", 2 * CONTEXT)
    monkeypatch.setattr(scoring, "POSITION_BLOCK", 50)
    monkeypatch.setattr(scoring, "VOCAB_BLOCK", 97)
    other = score(*models, windows)
    np.testing.assert_allclose(other.nll, scores.nll, rtol=1e-6)
    np.testing.assert_allclose(other.kld, scores.kld, rtol=1e-6)
    np.testing.assert_array_equal(other.same_top, scores.same_top)


@pytest.mark.parametrize("resident", [True, False])
def test_weights_that_are_streamed_are_read_once(
    tiny_checkpoint: Callable[..., Path],
    windows: NDArray[np.int32],
    monkeypatch: pytest.MonkeyPatch,
    resident: bool,
) -> None:
    checkpoint = open_checkpoint(tiny_checkpoint(vocab=1301))
    session, read = ReferenceSession(checkpoint, resident=resident), list[int]()
    layer = checkpoint.layer

    def counted(index: int) -> dict[str, NDArray[np.float32]]:
        read.append(index)
        return layer(index)

    monkeypatch.setattr(checkpoint, "layer", counted)
    monkeypatch.setattr(scoring, "TOKEN_BATCH", 2 * CONTEXT)
    final_states(session, windows, SilentProgress(), "reference")
    assert read == [0, 1]


def test_sums_at_extreme_logits() -> None:
    """Logits that rise by hundreds from block to block, where exp alone would overflow."""
    reference = np.array([[-900, 0, 500, 501, 499, 120]], np.float32)
    model = np.array([[-300, 10, 200, 203, 900, 890]], np.float32)
    sums = divergence.Sums(np.array([3], np.int32))
    for start in range(0, 6, 2):
        block = slice(start, start + 2)
        sums.add(reference[:, block].copy(), model[:, block].copy(), start)
    scores = sums.scores()
    wide0, wide1 = reference.astype(np.float64), model.astype(np.float64)
    log0 = np.log(np.exp(wide0 - 501).sum()) + 501
    log1 = np.log(np.exp(wide1 - 900).sum()) + 900
    expected = (np.exp(wide0 - log0) * (wide0 - wide1 - log0 + log1)).sum()
    np.testing.assert_allclose(scores.kld, expected, rtol=1e-6)
    np.testing.assert_allclose(scores.nll_reference, log0 - 501, rtol=1e-6)
    np.testing.assert_allclose(scores.nll, log1 - 203, rtol=1e-6)
    assert not scores.same_top[0]


def test_perplexity_of_torch(
    models: tuple[ReferenceSession, ReferenceSession],
    windows: NDArray[np.int32],
    scores: Scores,
) -> None:
    import torch

    _, reference = models
    flat = reference.score(windows).reshape(-1, reference.config.hidden_size)
    logits = reference.logits(flat, 0, 1301).reshape(*windows.shape, -1)
    half = slice(CONTEXT // 2, CONTEXT - 1)
    loss = torch.nn.functional.cross_entropy(
        torch.from_numpy(logits[:, half].reshape(-1, 1301)),
        torch.from_numpy(windows[:, CONTEXT // 2 + 1 :].reshape(-1)).long(),
    )
    assert scores.reference_perplexity.value == pytest.approx(float(loss.exp()), rel=1e-5)


def test_perplexity_error_is_that_of_llama_cpp() -> None:
    """ppl * sqrt((E[nll^2] - E[nll]^2) / (n - 1))"""
    nll, n = KNOWN.nll, KNOWN.nll.size
    perplexity = np.exp(sum(nll) / n)
    variance = (nll**2).sum() / n - (nll.sum() / n) ** 2
    assert KNOWN.perplexity.value == pytest.approx(perplexity)
    assert KNOWN.perplexity.stderr == pytest.approx(perplexity * np.sqrt(variance / (n - 1)))


def test_error_of_the_ratio_is_paired() -> None:
    """llama.cpp: the variances of both less twice their covariance."""
    covariance = np.cov(KNOWN.nll, KNOWN.nll_reference) / KNOWN.nll.size
    paired = np.sqrt(covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1])
    ratio = KNOWN.perplexity.value / KNOWN.reference_perplexity.value
    assert KNOWN.perplexity_ratio.value == pytest.approx(ratio)
    assert KNOWN.perplexity_ratio.stderr == pytest.approx(ratio * paired)


def test_kl_divergence_figures() -> None:
    facts, ordered = KNOWN.kld_facts, np.sort(KNOWN.kld)
    assert facts.mean == pytest.approx(sum(ordered) / 101)
    assert facts.stderr == pytest.approx(np.std(ordered, ddof=1) / np.sqrt(101))
    assert (facts.median, facts.p99, facts.max) == (ordered[50], ordered[99], ordered[100])
    assert facts.p99_9 == pytest.approx(0.1 * ordered[99] + 0.9 * ordered[100])


def test_percentages() -> None:
    share = 75 / 101
    error = np.sqrt(share * (1 - share) / 100)
    assert KNOWN.same_top_percent.value == pytest.approx(100 * share)
    assert KNOWN.same_top_percent.stderr == pytest.approx(100 * error)
    mean_square = (KNOWN.delta_p**2).sum() / 101
    assert KNOWN.rms_delta_p_percent == pytest.approx(100 * np.sqrt(mean_square))
    assert KNOWN.mean_delta_p_percent.value == pytest.approx(100 * KNOWN.delta_p.sum() / 101)


def test_stored_reference_states_give_the_same_scores(
    models: tuple[ReferenceSession, ReferenceSession],
    windows: NDArray[np.int32],
    scores: Scores,
    tmp_path: Path,
) -> None:
    model, reference = models
    key = states_key(WEIGHTS, reference.config, windows)
    states = final_states(reference, windows, SilentProgress(), "reference")
    ReferenceStates(key, states).save(tmp_path / "states.npz")
    loaded = ReferenceStates.load(tmp_path / "states.npz", key)
    assert loaded is not None
    again = score(model, reference, windows, reference_states=loaded.hidden)
    np.testing.assert_array_equal(again.kld, scores.kld)


def test_states_of_other_weights_or_text_are_not_used(
    models: tuple[ReferenceSession, ReferenceSession], windows: NDArray[np.int32], tmp_path: Path
) -> None:
    config = models[1].config
    key = states_key(WEIGHTS, config, windows)
    ReferenceStates(key, np.zeros((3, 4), np.float32)).save(tmp_path / "states.npz")
    others = [
        states_key(
            {"model.safetensors": WEIGHTS["model.safetensors"] | {"sha256": "cd"}}, config, windows
        ),
        states_key(WEIGHTS, replace(config, rms_norm_eps=0.3), windows),
        states_key(WEIGHTS, config, windows + 1),
        states_key(WEIGHTS, config, windows.reshape(-1, CONTEXT // 2)),
    ]
    assert [ReferenceStates.load(tmp_path / "states.npz", other) for other in others] == [None] * 4


@pytest.mark.parametrize("content", [b"", b"not a zip file", b"PK\x03\x04 cut off"])
def test_a_file_that_holds_no_states_is_not_replaced(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "states.npz"
    path.write_bytes(content)
    for ask in (partial(ReferenceStates.load, path, "key"), partial(ValidateOptions, states=path)):
        with pytest.raises(UsageError, match=r"states\.npz: holds no states of a reference"):
            ask()
    assert path.read_bytes() == content
    assert ReferenceStates.load(tmp_path / "absent.npz", "key") is None


def test_states_without_a_place_are_refused_before_any_work(tmp_path: Path) -> None:
    for path, message in ((tmp_path, "is a folder"), (tmp_path / "a" / "b", "no such folder")):
        with pytest.raises(UsageError, match=message):
            ValidateOptions(states=path)
    assert list(tmp_path.iterdir()) == []


def test_model_that_overflows_is_refused(
    models: tuple[ReferenceSession, ReferenceSession],
    windows: NDArray[np.int32],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(scoring, "TOKEN_BATCH", 2 * CONTEXT)
    _, reference = models
    with pytest.raises(DeviceError, match="hidden states in chunks 4 to 5 are not finite"):
        final_states(Overflowing(reference, windows[5]), windows, SilentProgress(), "model")


class NoisyHead(ReferenceSession):
    """A model whose head is a little off."""

    def __init__(self, session: ReferenceSession, noise: NDArray[np.float32]) -> None:
        self.__dict__.update(session.__dict__)
        self._noise = noise

    def logits(self, hidden: NDArray[np.float32], start: int, stop: int) -> NDArray[np.float32]:
        exact = super().logits(hidden, start, stop)
        off: NDArray[np.float32] = exact + hidden @ self._noise[start:stop].T
        return off


class Overflowing(ReferenceSession):
    """A model that gives infinity on one window."""

    def __init__(self, session: ReferenceSession, window: NDArray[np.int32]) -> None:
        self.__dict__.update(session.__dict__)
        self._window = window

    def score(self, tokens: NDArray[np.int32]) -> NDArray[np.float32]:
        hidden = super().score(tokens)
        hidden[(tokens == self._window).all(axis=1), -3:] = np.inf
        return hidden
