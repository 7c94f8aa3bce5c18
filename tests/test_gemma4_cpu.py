"""Gemma 4 on the CPU backend: the reference's logits, and the same bits however tokens come."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.gemma4 import rounded_models
from tests.test_reference import random_tokens
from uq.formats.bundle import Bundle
from uq.kernels.cpu import open_cpu
from uq.kernels.cpu.batch import CpuBatch
from uq.kernels.reference import ReferenceSession
from uq.kernels.session import Piece, Sampling
from uq.kernels.weights import BundleWeights

TRUE_HEADS = {"head_dim": 256, "global_head_dim": 512, "num_hidden_layers": 2, "layer_types": None}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "small": ("small", {"sliding_window": 9}),
    "large": ("large", {"sliding_window": 40}),
    "experts": ("experts", {}),
    "all": ("all", {"sliding_window": 33}),
    "heads of 256 and 512": ("large", TRUE_HEADS),
}


@pytest.fixture(scope="module")
def bundle(
    tiny_gemma4: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Bundle]:
    return rounded_models(tiny_gemma4, tmp_path_factory.mktemp("gemma4-cpu"), MODELS)


@pytest.mark.parametrize("name", MODELS)
def test_logits_of_the_reference(bundle: Callable[[str], Bundle], name: str) -> None:
    """Inputs of linears in 16 bits move them by less than 1e-3 of the logits' range."""
    session = open_cpu(bundle(name), max_context=700)
    truth = ReferenceSession(BundleWeights(bundle(name)))
    tokens = random_tokens(truth, 1, 600)
    vocab = truth.config.vocab_size
    ours = session.logits(session.score(tokens)[0], 0, vocab)
    theirs = truth.logits(truth.score(tokens)[0], 0, vocab)
    assert np.abs(ours - theirs).max() < 1e-3 * np.abs(theirs).max()


@pytest.mark.parametrize("name", ["all", "large"])
def test_a_token_has_the_same_bits_alone_and_in_a_block(
    bundle: Callable[[str], Bundle], name: str
) -> None:
    session = open_cpu(bundle(name), max_context=64)
    tokens = np.arange(2, 52, dtype=np.int32)[None] * 7 % 512
    together = session.logits(session.score(tokens)[0], 0, 512)
    for token, expected in zip(tokens[0].tolist(), together, strict=True):
        session.prefill([token])
        np.testing.assert_array_equal(session.next_logits, expected)


def test_many_sequences_have_the_bits_of_one(bundle: Callable[[str], Bundle]) -> None:
    model = bundle("all")
    texts = [
        np.arange(start, start + length) % 512 for start, length in ((3, 30), (99, 7), (7, 23))
    ]
    batch = CpuBatch(model.config, model, slots=3, max_context=64)
    pieces = [Piece(slot, text.tolist()) for slot, text in enumerate(texts)]
    together = np.split(batch.extend(pieces), np.cumsum([len(text) for text in texts])[:-1])
    for text, found in zip(texts, together, strict=True):
        np.testing.assert_array_equal(alone(model, text), found)


def test_greedy_decoding_follows_scoring(bundle: Callable[[str], Bundle]) -> None:
    session = open_cpu(bundle("all"), max_context=64)
    prompt = [2, 40, 41, 77, 300]
    session.prefill(prompt)
    decoded = list(session.decode(30, Sampling()))
    hidden = session.score(np.array([prompt + decoded], np.int32))
    logits = session.logits(hidden[0], 0, 512)
    assert logits[4:-1].argmax(axis=-1).tolist() == decoded


def test_a_token_reads_only_the_experts_that_it_chooses(bundle: Callable[[str], Bundle]) -> None:
    model = bundle("experts")
    stored = sum(record.size for record in model.manifest.files.values())
    config = model.config
    assert config.experts is not None
    idle = (config.experts.count - config.experts.active) * 3 * 32 * 64 * config.num_layers
    assert open_cpu(model, max_context=8).bytes_per_token < stored - idle // 2


def alone(model: Bundle, text: NDArray[np.intp]) -> NDArray[np.float32]:
    hidden = open_cpu(model, max_context=64).score(text.astype(np.int32)[None])  # (1, n, hidden)
    return hidden.reshape(hidden.shape[1:])
