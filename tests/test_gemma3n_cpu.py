"""Gemma 3n on the CPU backend: the reference's logits, and the same bits however tokens come."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.test_gemma4_cpu import alone
from tests.test_reference import random_tokens
from uq.formats.bundle import Bundle, open_bundle
from uq.formats.checkpoint import open_checkpoint
from uq.kernels.cpu import open_cpu
from uq.kernels.cpu.batch import CpuBatch
from uq.kernels.reference import ReferenceSession
from uq.kernels.session import Piece, Sampling
from uq.kernels.weights import BundleWeights
from uq.quantize.pipeline import QuantizeOptions, quantize

VARIANTS = ("plain", "other")


@pytest.fixture(scope="module")
def bundles(
    tiny_gemma3n: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Bundle]:
    """Models by variant, rounded to the nearest INT4 codes, with a window that is left behind."""
    root = tmp_path_factory.mktemp("gemma3n-cpu")
    options = QuantizeOptions(recipe="int4", method="rtn")
    return {
        name: open_bundle(
            quantize(
                open_checkpoint(tiny_gemma3n(name, text={"sliding_window": 33})),
                root / name,
                options,
            )
        )
        for name in VARIANTS
    }


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_of_the_reference(bundles: dict[str, Bundle], name: str) -> None:
    """Inputs of linears in 16 bits move them by less than 1e-3 of the logits' range."""
    session = open_cpu(bundles[name], max_context=700)
    truth = ReferenceSession(BundleWeights(bundles[name]))
    tokens = random_tokens(truth, 1, 600)
    ours = session.logits(session.score(tokens)[0], 0, 512)
    theirs = truth.logits(truth.score(tokens)[0], 0, 512)
    assert np.abs(ours - theirs).max() < 1e-3 * np.abs(theirs).max()


def test_a_token_has_the_same_bits_alone_and_in_a_block(bundles: dict[str, Bundle]) -> None:
    session = open_cpu(bundles["plain"], max_context=64)
    tokens = np.arange(2, 52, dtype=np.int32)[None] * 7 % 512
    together = session.logits(session.score(tokens)[0], 0, 512)
    for token, expected in zip(tokens[0].tolist(), together, strict=True):
        session.prefill([token])
        np.testing.assert_array_equal(session.next_logits, expected)


def test_many_sequences_have_the_bits_of_one(bundles: dict[str, Bundle]) -> None:
    model = bundles["plain"]
    texts = [
        np.arange(start, start + length) % 512 for start, length in ((3, 30), (99, 7), (7, 23))
    ]
    batch = CpuBatch(model.config, model, slots=3, max_context=64)
    pieces = [Piece(slot, text.tolist()) for slot, text in enumerate(texts)]
    together = np.split(batch.extend(pieces), np.cumsum([len(text) for text in texts])[:-1])
    for text, found in zip(texts, together, strict=True):
        np.testing.assert_array_equal(alone(model, text), found)


def test_greedy_decoding_follows_scoring(bundles: dict[str, Bundle]) -> None:
    session = open_cpu(bundles["plain"], max_context=64)
    prompt = [2, 40, 41, 77, 300]
    session.prefill(prompt)
    decoded = list(session.decode(30, Sampling()))
    hidden = session.score(np.array([prompt + decoded], np.int32))
    logits = session.logits(hidden[0], 0, 512)
    assert logits[4:-1].argmax(axis=-1).tolist() == decoded
