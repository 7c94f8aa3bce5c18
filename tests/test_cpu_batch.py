"""Sequences that run together get the bits that each gets alone."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from uq.errors import UsageError
from uq.formats.bundle import Bundle, open_bundle
from uq.kernels.cpu.batch import CpuBatch
from uq.kernels.cpu.session import CpuSession
from uq.kernels.session import Piece

MODELS: dict[str, dict[str, Any]] = {
    "gemma": {"family": "gemma", "kv_heads": 4, "tied": False},
    "gemma2": {"family": "gemma2", "config": {"attn_logit_softcapping": 1.0}},
    "gemma3": {"family": "gemma3", "layers": 3, "head_dim": 64},
    "gemma3 many heads": {"family": "gemma3", "heads": 16, "kv_heads": 1, "window": 50},
}


def batch(bundle: Bundle, slots: int = 4, **options: Any) -> CpuBatch:
    return CpuBatch(bundle.config, bundle, slots=slots, **options)


def random_tokens(count: int, seed: int = 0) -> list[int]:
    tokens: list[int] = np.random.default_rng(seed).integers(0, 512, count).tolist()
    return tokens


def alone(bundle: Bundle, tokens: list[int]) -> NDArray[np.float32]:
    """(tokens, hidden) of a sequence that has a session to itself."""
    session = CpuSession(bundle.config, bundle)
    hidden: NDArray[np.float32] = session.score(np.array([tokens], np.int32))[0]
    return hidden


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Callable[..., Path]) -> Bundle:
    return open_bundle(tiny_bundle(layers=3))


@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS)
def test_a_sequence_has_the_bits_of_its_own_session(
    tiny_bundle: Callable[..., Path], options: dict[str, Any]
) -> None:
    bundle = open_bundle(tiny_bundle(**options))
    session = batch(bundle, max_context=300)
    texts = [random_tokens(count, seed) for seed, count in enumerate((150, 7, 64, 200))]
    seen: list[list[NDArray[np.float32]]] = [[], [], [], []]
    rng = np.random.default_rng(1)
    while any(session.length(slot) < len(text) for slot, text in enumerate(texts)):
        pieces = []
        for slot in rng.permutation(4)[: rng.integers(1, 5)].tolist():
            rest = texts[slot][session.length(slot) :][: rng.choice([1, 1, 2, 13, 40])]
            if rest:
                pieces.append(Piece(slot, rest))
        if pieces:
            hidden = session.extend(pieces).copy()
            ends = np.cumsum([len(piece.tokens) for piece in pieces])
            for piece, rows in zip(pieces, np.split(hidden, ends[:-1]), strict=True):
                seen[piece.slot].append(rows)
    for text, parts in zip(texts, seen, strict=True):
        np.testing.assert_array_equal(np.concatenate(parts), alone(bundle, text))


def test_threads_change_no_bit(bundle: Bundle) -> None:
    pieces = [Piece(slot, random_tokens(5 + slot, slot)) for slot in range(4)]
    one, two = (batch(bundle, threads=threads).extend(pieces) for threads in (1, 2))
    np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("length", [600, 530, 300, 89, 88, 1])
def test_a_rewound_sequence_is_as_good_as_new(bundle: Bundle, length: int) -> None:
    """The sliding layers keep 16 - 1 + 512 tokens in rings of 544: those of 57 to 600."""
    session = batch(bundle, slots=2, max_context=700)
    text = random_tokens(600)
    session.extend([Piece(1, text[:512])])
    session.extend([Piece(1, text[512:])])
    kept = session.rewind(1, length)
    assert kept == (length if length >= 71 else 0)
    other = random_tokens(20, seed=1)
    hidden = session.extend([Piece(0, [3]), Piece(1, other)])[1:]
    np.testing.assert_array_equal(hidden, alone(bundle, text[:kept] + other)[kept:])


@pytest.mark.parametrize("seed", range(3))
def test_sequences_rewound_again_and_again_are_as_good_as_new(bundle: Bundle, seed: int) -> None:
    """What was overwritten in the rings stays lost, however short the sequence is made."""
    session = batch(bundle, slots=1, max_context=1300)
    rng = random.Random(seed)
    text = random_tokens(1200, seed)
    reused = 0
    for first in range(0, 1200, 400):
        session.extend([Piece(0, text[first : first + 400])])
    for step in range(12):
        length = rng.randrange(len(text) // 2, len(text) + 1)
        kept = session.rewind(0, length)
        assert kept in (0, length)
        reused += kept > 0
        new = random_tokens(rng.choice([1, 10, 60]), 100 * seed + step)
        text = text[:kept] + new
        hidden = session.extend([Piece(0, new)])
        np.testing.assert_array_equal(hidden, alone(bundle, text)[kept:])
    assert reused


def test_what_is_lost_for_a_sequence_is_not_for_the_next(bundle: Bundle) -> None:
    session = batch(bundle, slots=1, max_context=1300)
    for start in range(0, 1200, 400):
        session.extend([Piece(0, random_tokens(400, start))])
    assert session.rewind(0, 300) == 0
    text = random_tokens(100)
    session.extend([Piece(0, text)])
    assert session.rewind(0, 50) == 50
    hidden = session.extend([Piece(0, [5, 6])])
    np.testing.assert_array_equal(hidden, alone(bundle, [*text[:50], 5, 6])[50:])


def test_a_short_sequence_can_always_be_rewound(bundle: Bundle) -> None:
    session = batch(bundle)
    session.extend([Piece(2, random_tokens(500))])
    assert session.rewind(2, 1) == 1 == session.length(2)
    assert session.rewind(2, 5) == 0, "it has no five tokens any more"


def test_the_order_of_the_slots_does_not_matter(bundle: Bundle) -> None:
    pieces = [Piece(slot, random_tokens(9, slot)) for slot in (3, 0, 2)]
    forth = batch(bundle).extend(pieces)
    back = batch(bundle).extend(pieces[::-1])
    np.testing.assert_array_equal(forth.reshape(3, 9, -1), back.reshape(3, 9, -1)[::-1])


@pytest.mark.parametrize(
    ("pieces", "message"),
    [
        ([Piece(0, [1]), Piece(0, [2])], "same slot"),
        ([Piece(0, [5] * 40), Piece(1, [5] * 40)], "80 tokens in one step; at most 64 fit"),
        ([Piece(0, [5]), Piece(1, [512])], "token 512 is not in the vocabulary"),
        ([Piece(0, [])], "there are no tokens"),
    ],
)
def test_an_impossible_step_is_refused(bundle: Bundle, pieces: list[Piece], message: str) -> None:
    session = batch(bundle, max_context=64)
    with pytest.raises(UsageError, match=message):
        session.extend(pieces)
    assert [session.length(slot) for slot in range(4)] == [0] * 4


def test_a_full_context_is_refused(bundle: Bundle) -> None:
    session = batch(bundle, max_context=64)
    session.extend([Piece(1, random_tokens(60))])
    with pytest.raises(UsageError, match="5 tokens do not fit behind 60 in a context of 64"):
        session.extend([Piece(0, [1]), Piece(1, [1] * 5)])
    assert (session.length(0), session.length(1)) == (0, 60)


@pytest.mark.parametrize("slots", [0, 513])
def test_impossible_slots_are_refused(bundle: Bundle, slots: int) -> None:
    with pytest.raises(UsageError, match=f"{slots} sequences"):
        batch(bundle, slots=slots)
