"""Windows of text by llama.cpp's protocol."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from uq.errors import UsageError
from uq.formats.checkpoint import open_checkpoint
from uq.formats.tokenizer import Tokenizer
from uq.validate.text import chunks, scored, targets

TEXT = "The city of the world had been the first of two, and after that time not one other. " * 4


@pytest.fixture(scope="module")
def tokenizer(tiny_checkpoint: Callable[..., Path]) -> Tokenizer:
    return open_checkpoint(tiny_checkpoint()).tokenizer()


def test_windows_continue_the_text_behind_bos(tokenizer: Tokenizer) -> None:
    """The text begins with BOS; later windows lose their first token to it."""
    ids = tokenizer.encode(TEXT, bos=True)
    windows = chunks(tokenizer, TEXT, 16)
    assert windows.dtype == np.int32
    assert windows.shape == (len(ids) // 16, 16)
    assert (windows[:, 0] == tokenizer.bos).all()
    expected = [ids[first + 1 : first + 16] for first in range(0, len(ids) - 15, 16)]
    assert windows[:, 1:].tolist() == expected


def test_second_half_of_a_window_is_scored() -> None:
    """llama.cpp: positions n / 2 to n - 2, 255 of 512."""
    positions = list(range(512))[scored(512)]
    assert (positions[0], positions[-1], len(positions)) == (256, 510, 255)


def test_targets_are_the_next_tokens() -> None:
    windows = np.arange(16, dtype=np.int32).reshape(2, 8)
    assert targets(windows).tolist() == [5, 6, 7, 13, 14, 15]


def test_number_of_windows_is_bounded(tokenizer: Tokenizer) -> None:
    np.testing.assert_array_equal(chunks(tokenizer, TEXT, 16, 2), chunks(tokenizer, TEXT, 16)[:2])
    assert len(chunks(tokenizer, TEXT, 16, 10**6)) == len(chunks(tokenizer, TEXT, 16))


def test_special_tokens_in_a_text_are_text(tokenizer: Tokenizer) -> None:
    windows = chunks(tokenizer, "<eos>" * 100, 16)
    assert tokenizer.eos[0] not in windows


def test_short_text_is_refused(tokenizer: Tokenizer) -> None:
    count = len(tokenizer.encode("of the", bos=True))
    with pytest.raises(UsageError, match=f"the text has {count} tokens and a window needs 512"):
        chunks(tokenizer, "of the")


def test_text_of_exactly_one_window_is_enough(tokenizer: Tokenizer) -> None:
    count = len(tokenizer.encode(TEXT, bos=True))
    assert chunks(tokenizer, TEXT, count).shape == (1, count)
    with pytest.raises(UsageError, match=f"{count} tokens and a window needs {count + 1}"):
        chunks(tokenizer, TEXT, count + 1)


@pytest.mark.parametrize(("context", "max_chunks"), [(3, None), (0, None), (16, 0)])
def test_useless_sizes_are_refused(
    tokenizer: Tokenizer, context: int, max_chunks: int | None
) -> None:
    with pytest.raises(UsageError, match="use at least"):
        chunks(tokenizer, TEXT, context, max_chunks)
