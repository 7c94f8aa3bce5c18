"""The state of a sequence on the device (struct State of shaders/common.glsl), from the host."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from uq.kernels.vulkan.commands import Recorder
from uq.kernels.vulkan.device import Gpu
from uq.kernels.vulkan.memory import CACHED, HOST, Slab, Span

MOST_TOKENS, STEPS = 512, 64  # of a pass, of a submit
POSITION, COUNT, STEP, CHOICE, TOKENS = 0, 1, 2, 3, 4
GENERATED = TOKENS + MOST_TOKENS
WORDS = GENERATED + STEPS  # that are copied; the counters behind them are the kernels' own


class Mailbox:
    """Mapped copies of the state: one that a submit begins with and one that it leaves.

    Attributes:
        begin, end: command buffers that go in front of and behind the work of a submit.
    """

    def __init__(self, gpu: Gpu, state: Span) -> None:
        self._inbox, self._outbox = Slab(gpu, 4 * WORDS, HOST), Slab(gpu, 4 * WORDS, CACHED)
        region = state.part(0, 4 * WORDS)
        self._begin, self._end = Recorder(gpu), Recorder(gpu)
        self._begin.copy(self._inbox.span, region)
        self._end.copy(region, self._outbox.span)
        for recorder in (self._begin, self._end):
            recorder.end()
        self.begin, self.end = self._begin.commands, self._end.commands

    def post(
        self,
        position: int,
        *,
        tokens: Sequence[int] = (),
        choice: int = 0,
    ) -> None:
        """What the next submit begins with; without `tokens` it is one for decode steps."""
        words = self._words(self._inbox)
        words[[POSITION, COUNT, STEP, CHOICE]] = position, max(1, len(tokens)), 0, choice
        words[TOKENS:GENERATED] = 0  # columns behind the tokens read a row of the embedding, too
        words[TOKENS : TOKENS + len(tokens)] = tokens

    @property
    def choice(self) -> int:
        """The token that follows, as the last submit left it."""
        return int(self._words(self._outbox)[CHOICE])

    def generated(self, steps: int) -> list[int]:
        tokens: list[int] = self._words(self._outbox)[GENERATED : GENERATED + steps].tolist()
        return tokens

    def close(self) -> None:
        for part in (self._begin, self._end, self._inbox, self._outbox):
            part.close()

    @staticmethod
    def _words(slab: Slab) -> NDArray[np.uint32]:
        assert slab.bytes is not None
        return slab.bytes.view(np.uint32)
