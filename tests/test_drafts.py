"""Guesses of the next tokens."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from uq.kernels.vulkan.drafts import LONGEST, SHORTEST, Drafts


def drafts(*tokens: int) -> Drafts:
    made = Drafts()
    made.add(tokens)
    return made


def test_what_followed_the_same_words() -> None:
    assert drafts(1, 2, 3, 4, 5, 9, 1).guess(2, 3) == [3, 4, 5]
    assert drafts(1, 2, 3, 4, 5, 9, 1).guess(2, 9) == [3, 4, 5, 9, 1]


def test_the_longest_run_of_words_decides_then_the_latest() -> None:
    assert drafts(7, 1, 2, 3, 8, 1, 2, 4, 7, 1).guess(2, 1) == [3]
    assert drafts(1, 2, 3, 1, 2, 4, 1).guess(2, 1) == [4]


def test_nothing_is_guessed_of_new_words() -> None:
    assert drafts(1, 2, 3).guess(4, 5) == []
    assert drafts().guess(1, 5) == []
    assert drafts(1).guess(1, 5) == []


def test_a_text_that_was_cut() -> None:
    made = drafts(1, 2, 3, 4, 5, 6)
    made.cut(2)
    made.add([7, 1])
    assert made.guess(2, 5) == [7, 1]
    made.cut(0)
    assert made.guess(2, 5) == []


@settings(deadline=None)
@given(st.lists(st.integers(0, 3), max_size=60), st.integers(0, 3), st.integers(1, 9))
def test_a_guess_stood_behind_the_same_words(text: list[int], following: int, count: int) -> None:
    """Against a search through the whole text."""
    found = drafts(*text).guess(following, count)
    for size in range(LONGEST, SHORTEST - 1, -1):
        words = [*text, following][-size:]
        places = [i for i in range(size, len(text)) if text[i - size : i] == words]
        if len(words) == size and places:
            assert found == text[places[-1] : places[-1] + count]
            return
    assert found == []
