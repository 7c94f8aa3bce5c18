"""Guesses of the next tokens: what followed the same words the last time they stood in the text."""

from __future__ import annotations

from collections.abc import Sequence

LONGEST, SHORTEST = 4, 2  # tokens that must be the same


class Drafts:
    """A text and where each run of its tokens last stood (prompt lookup, n-gram speculation)."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self._last: dict[tuple[int, ...], int] = {}  # tokens -> the place behind them

    def add(self, tokens: Sequence[int]) -> None:
        for token in tokens:
            # What ends here is found when it comes again, not now.
            for size in range(SHORTEST, LONGEST + 1):
                if len(self.tokens) >= size:
                    self._last[tuple(self.tokens[-size:])] = len(self.tokens)
            self.tokens.append(token)

    def cut(self, length: int) -> None:
        """Forget the tokens from `length` on."""
        del self.tokens[length:]

    def guess(self, following: int, count: int) -> list[int]:
        """Up to `count` tokens behind `following`, which comes next."""
        for size in range(LONGEST, SHORTEST - 1, -1):
            words = (*self.tokens[-(size - 1) :], following)
            place = self._last.get(words, 0)
            if place and self.tokens[place - size : place] == list(words):
                return self.tokens[place : place + count]
        return []
