"""How much work goes into one submit: so much that it is worth it, so little that it ends soon."""

from __future__ import annotations

LEAST = 16  # of what begins with more: its weights are read once for all
SUBMIT_SECONDS = 0.25  # of one submit: display drivers end what takes two seconds


class Pace:
    """Doubles while twice the work would be quick enough, halves when it was too slow.

    Attributes:
        size: of the next submit, in steps or in tokens.
    """

    def __init__(self, first: int, most: int) -> None:
        self.size = min(first, most)
        self._least, self._most = min(LEAST, self.size), most

    def took(self, size: int, seconds: float) -> None:
        """A submit of `size` took so long."""
        if size == self.size and 2 * seconds < SUBMIT_SECONDS:
            self.size = min(2 * self.size, self._most)
        elif seconds > SUBMIT_SECONDS:
            self.size = max(self._least, self.size // 2)
