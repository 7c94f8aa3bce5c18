"""Text as it comes out of generated tokens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from uq.formats.checkpoint import open_checkpoint
from uq.formats.tokenizer import Tokenizer
from uq.generation import Rate, write_text


@pytest.fixture(scope="module")
def tokenizer(tiny_checkpoint: Callable[..., Path]) -> Tokenizer:
    return open_checkpoint(tiny_checkpoint()).tokenizer()


def test_text_is_written_as_it_comes(tokenizer: Tokenizer) -> None:
    said: list[str] = []
    tokens = tokenizer.encode("the time 世界 é", bos=False)
    assert write_text(tokens, tokenizer, said.append) == len(tokens)
    assert "".join(said) == "the time 世界 é"
    assert said[0] == tokenizer.decode(tokens[:1])


def test_text_ends_at_an_end_token_and_takes_no_more(tokenizer: Tokenizer) -> None:
    said: list[str] = []
    words = tokenizer.encode("the end", bos=False)
    tokens = iter([*words, tokenizer.eos[-1], *words])
    assert write_text(tokens, tokenizer, said.append) == len(words)
    assert "".join(said) == "the end"
    assert list(tokens) == words


def test_an_unfinished_character_is_shown_at_the_end(tokenizer: Tokenizer) -> None:
    said: list[str] = []
    first_byte = 6 + 0xE7  # <0xE7> opens a character of three bytes
    assert write_text([first_byte], tokenizer, said.append) == 1
    assert said == ["", "\ufffd"]


def test_a_rate_without_time_is_zero() -> None:
    assert Rate(3, 2.0).per_second == 1.5
    assert Rate(0, 0.0).per_second == 0.0
