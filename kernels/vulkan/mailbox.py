"""The state of the sequences on the device (`state.py`), from the host."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from uq.kernels.sampling import uniform
from uq.kernels.session import Sampling
from uq.kernels.vulkan.commands import Recorder
from uq.kernels.vulkan.device import Gpu
from uq.kernels.vulkan.memory import CACHED, HOST, Slab, Span
from uq.kernels.vulkan.state import KEPT_WORDS, MOST_STEPS, POSTED_WORDS, views

WORDS = POSTED_WORDS + KEPT_WORDS  # the counters behind them are the kernels' own


@dataclass(frozen=True)
class Writer:
    """A sequence that is to be continued: `token` goes to `position` of the KV cache `slot`."""

    slot: int
    position: int
    token: int
    sampling: Sampling = Sampling()


@dataclass(frozen=True)
class Run:
    """Neighbouring tokens of one sequence; the first goes to `position` of the KV cache `slot`."""

    slot: int
    position: int
    tokens: Sequence[int]


class Mailbox:
    """Mapped copies of the state: one that a submit begins with and one that it leaves.

    Attributes:
        begin, end: command buffers that go in front of and behind the work of a submit.
    """

    def __init__(self, gpu: Gpu, state: Span) -> None:
        self._inbox, self._outbox = Slab(gpu, 4 * WORDS, HOST), Slab(gpu, 4 * KEPT_WORDS, CACHED)
        self._begin, self._end = Recorder(gpu), Recorder(gpu)
        self._begin.copy(self._inbox.span, state.part(0, 4 * WORDS))
        self._end.copy(state.part(4 * POSTED_WORDS, 4 * KEPT_WORDS), self._outbox.span)
        for recorder in (self._begin, self._end):
            recorder.end()
        self.begin, self.end = self._begin.commands, self._end.commands

    def post_runs(self, runs: Sequence[Run], tile: int) -> None:
        """The next submit is a pass of these tokens; no sequence moves on.

        Args:
            tile: tokens that a workgroup of attention takes at a time.
        """
        state = self._emptied()
        column, pieces = 0, []
        for run in runs:
            columns = slice(column, column + len(run.tokens))
            state["tokens"][columns] = run.tokens
            state["positions"][columns] = np.arange(len(run.tokens)) + run.position
            state["slots"][columns] = run.slot
            starts = range(column, columns.stop, tile)
            pieces += [(start, min(tile, columns.stop - start)) for start in starts]
            column = columns.stop
        state["count"][0], state["run_count"][0] = column, len(pieces)
        state["run_columns"][: len(pieces)] = [start for start, _ in pieces]
        state["run_tokens"][: len(pieces)] = [count for _, count in pieces]
        state["done"][:] = 1

    def post_writers(
        self, writers: Sequence[Writer], steps: int, stops: Sequence[int], *, frozen: bool = False
    ) -> None:
        """The next submit continues each sequence by up to `steps` tokens, until one of `stops`.

        Args:
            frozen: the tokens that follow are chosen, but not appended.
        """
        state, count = self._emptied(), len(writers)
        state["count"][0], state["stop_count"][0] = count, len(stops)
        state["stops"][: len(stops)] = stops
        for name in ("tokens", "choices"):
            state[name][:count] = [writer.token for writer in writers]
        state["positions"][:count] = [writer.position for writer in writers]
        state["slots"][:count] = [writer.slot for writer in writers]
        state["temperatures"][:count] = [writer.sampling.temperature for writer in writers]
        state["top_ks"][:count] = [min(writer.sampling.top_k, 2**31) for writer in writers]
        state["top_ps"][:count] = [writer.sampling.top_p for writer in writers]
        draws = state["draws"].reshape(-1, MOST_STEPS)
        for row, writer in zip(draws, writers, strict=False):
            if writer.sampling.temperature > 0:
                first = writer.position + 1
                row[:steps] = [uniform(writer.sampling.seed, first + i) for i in range(steps)]
        state["done"][:] = 1
        state["done"][:count] = int(frozen)

    def choices(self, count: int) -> list[int]:
        """For each sequence the token that follows, as the last submit left it."""
        found: list[int] = self._left()["choices"][:count].tolist()
        return found

    @property
    def failed(self) -> bool:
        """Whether workgroups of the last submit have waited for each other in vain."""
        return bool(self._left()["failed"][0])

    def generated(self, count: int) -> list[list[int]]:
        """For each sequence the tokens that the last submit appended."""
        left = self._left()
        rows = left["generated"].reshape(-1, MOST_STEPS)[:count]
        return [row[:made].tolist() for row, made in zip(rows, left["made"], strict=False)]

    def close(self) -> None:
        for part in (self._begin, self._end, self._inbox, self._outbox):
            part.close()

    def _emptied(self) -> dict[str, NDArray[Any]]:
        """The inbox; columns behind the tokens read row 0 of the embedding."""
        assert self._inbox.bytes is not None
        words = self._inbox.bytes.view(np.uint32)
        words[:] = 0
        return views(words)

    def _left(self) -> dict[str, NDArray[Any]]:
        assert self._outbox.bytes is not None
        words = np.zeros(WORDS, np.uint32)
        words[POSTED_WORDS:] = self._outbox.bytes.view(np.uint32)
        return views(words)
