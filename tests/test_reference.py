"""The float32 forward pass against transformers, and generation against scoring."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from uq.errors import UsageError
from uq.formats.checkpoint import open_checkpoint
from uq.kernels.reference import ReferenceSession
from uq.kernels.session import Sampling

LENGTH = 1500
LINEAR_BY_8 = {"rope_scaling": {"rope_type": "linear", "factor": 8.0}}
MODELS: dict[str, dict[str, Any]] = {
    "gemma multi-query": {"family": "gemma", "kv_heads": 1},
    "gemma multi-head, untied": {"family": "gemma", "kv_heads": 4, "tied": False},
    "gemma odd sizes": {"family": "gemma", "hidden": 72, "head_dim": 24, "ffn": 100, "vocab": 367},
    "gemma2": {"family": "gemma2", "window": 700},
    "gemma2 short window": {"family": "gemma2", "window": 7, "heads": 8},
    "gemma2 soft-caps that bite": {
        "family": "gemma2",
        "config": {"attn_logit_softcapping": 1.5, "final_logit_softcapping": 2.0},
    },
    "gemma2 own attention scale": {"family": "gemma2", "config": {"query_pre_attn_scalar": 7}},
    "vaultgemma": {"family": "vaultgemma", "window": 300},
    "gemma3": {"layers": 7, "pattern": 6, "window": 512},
    "gemma3 window of one": {"window": 1},
    "gemma3 linear RoPE scaling": {"config": LINEAR_BY_8},
    "gemma3 odd sizes": {"hidden": 72, "head_dim": 24, "ffn": 100, "vocab": 367, "heads": 3,
                         "kv_heads": 1, "window": 129},
    "gemma3 untied": {"tied": False},
}  # fmt: skip


@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS.keys())
def test_logits_of_transformers(
    tiny_checkpoint: Callable[..., Path], options: dict[str, Any]
) -> None:
    folder = tiny_checkpoint(**options)
    expected = transformers_logits(folder)
    session = ReferenceSession(open_checkpoint(folder))
    tokens = random_tokens(session, 1, LENGTH)
    actual = all_logits(session, session.score(tokens))
    error = np.abs(actual - expected(tokens)).max(axis=-1)  # (1, length)
    assert error.max() <= 1e-4 * np.abs(actual).max()


def test_sequences_of_a_batch_are_independent(tiny_checkpoint: Callable[..., Path]) -> None:
    session = ReferenceSession(open_checkpoint(tiny_checkpoint()))
    tokens = random_tokens(session, 3, 200)
    together = session.score(tokens)
    alone = np.concatenate([session.score(row[None]) for row in tokens])
    np.testing.assert_allclose(together, alone, atol=2e-5)


def test_streamed_weights_give_the_same_hidden_states(
    tiny_checkpoint: Callable[..., Path],
) -> None:
    checkpoint = open_checkpoint(tiny_checkpoint(tied=False))
    streamed = ReferenceSession(checkpoint, resident=False)
    resident = ReferenceSession(checkpoint, resident=True)
    tokens = random_tokens(streamed, 2, 50)
    hidden = streamed.score(tokens)
    np.testing.assert_array_equal(hidden, resident.score(tokens))
    np.testing.assert_array_equal(all_logits(streamed, hidden), all_logits(resident, hidden))


@pytest.mark.parametrize("family", ["gemma", "gemma2", "vaultgemma", "gemma3"])
def test_greedy_decoding_follows_scoring(tiny_checkpoint: Callable[..., Path], family: str) -> None:
    """Each decoded token is the argmax behind the text so far, past the sliding window."""
    session = ReferenceSession(open_checkpoint(tiny_checkpoint(family=family, window=9)))
    prompt = random_tokens(session, 1, 20)[0].tolist()
    session.prefill(prompt[:13])
    session.prefill(prompt[13:])
    decoded = list(session.decode(30, Sampling()))
    assert session.position == 50
    scored = session.score(np.array([prompt + decoded], np.int32))
    assert all_logits(session, scored)[0, 19:-1].argmax(axis=-1).tolist() == decoded


def test_decoding_again_after_reset(tiny_checkpoint: Callable[..., Path]) -> None:
    session = ReferenceSession(open_checkpoint(tiny_checkpoint()))
    runs = []
    for _ in range(2):
        session.reset()
        session.prefill([2, 40, 41])
        runs.append(list(session.decode(10, Sampling(temperature=2.0, seed=3))))
    assert runs[0] == runs[1]


def test_scoring_leaves_the_cache_alone(tiny_checkpoint: Callable[..., Path]) -> None:
    checkpoint = open_checkpoint(tiny_checkpoint())
    plain, disturbed = ReferenceSession(checkpoint), ReferenceSession(checkpoint)
    plain.prefill([2, 40, 41])
    disturbed.prefill([2, 40, 41])
    disturbed.score(random_tokens(disturbed, 2, 30))
    greedy = Sampling()
    assert list(plain.decode(5, greedy)) == list(disturbed.decode(5, greedy))


def test_decoding_ends_at_the_maximum_context(tiny_checkpoint: Callable[..., Path]) -> None:
    session = ReferenceSession(open_checkpoint(tiny_checkpoint()), max_context=8)
    session.prefill([2, 40, 41])
    assert len(list(session.decode(100, Sampling()))) == 5
    with pytest.raises(UsageError, match="1 tokens do not fit behind 8 in a context of 8"):
        session.prefill([2])


def test_bytes_of_a_decoded_token(tiny_checkpoint: Callable[..., Path]) -> None:
    """All float32 parameters once; one row of the embedding, and the whole head."""
    tied = open_checkpoint(tiny_checkpoint())
    untied = open_checkpoint(tiny_checkpoint(tied=False))
    values = sum(int(np.prod(info.shape)) for info in tied.tensors.values())
    row = tied.config.hidden_size
    assert ReferenceSession(tied).bytes_per_token == 4 * (values + row)
    assert ReferenceSession(untied).bytes_per_token == 4 * (values + row)


@pytest.mark.parametrize("token", [-1, 512])
def test_unknown_token_is_refused(tiny_checkpoint: Callable[..., Path], token: int) -> None:
    session = ReferenceSession(open_checkpoint(tiny_checkpoint()))
    with pytest.raises(UsageError, match=f"token {token} is not in the vocabulary of 512"):
        session.score(np.array([[2, token]], np.int32))
    with pytest.raises(UsageError, match=f"token {token} is not in the vocabulary of 512"):
        session.prefill([2, token])


def test_decoding_without_a_prompt_is_refused(tiny_checkpoint: Callable[..., Path]) -> None:
    session = ReferenceSession(open_checkpoint(tiny_checkpoint()))
    with pytest.raises(UsageError, match="call prefill first"):
        next(session.decode(1, Sampling()))
    with pytest.raises(UsageError, match="no tokens"):
        session.prefill([])


def random_tokens(session: ReferenceSession, batch: int, length: int) -> NDArray[np.int32]:
    rng = np.random.default_rng(0)
    return rng.integers(0, session.config.vocab_size, (batch, length), dtype=np.int32)


def all_logits(session: ReferenceSession, hidden: NDArray[np.float32]) -> NDArray[np.float32]:
    """(batch, length, vocab), in two uneven blocks of the vocabulary."""
    vocab = session.config.vocab_size
    flat = hidden.reshape(-1, hidden.shape[-1])
    blocks = [session.logits(flat, 0, 100), session.logits(flat, 100, vocab)]
    return np.concatenate(blocks, axis=1).reshape(*hidden.shape[:-1], vocab)


def transformers_logits(folder: Path) -> Callable[[NDArray[np.int32]], NDArray[np.float32]]:
    """The model as transformers loads it, in float32 with its plain attention."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()

    def logits(tokens: NDArray[np.int32]) -> NDArray[np.float32]:
        with torch.no_grad():
            out: NDArray[np.float32] = model(torch.from_numpy(tokens).long()).logits.numpy()
        return out

    return logits
