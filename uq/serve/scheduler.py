"""Continuous batching: sequences join and leave between two steps of the model.

Orca (Yu et al., 2022) made the step, not the request, the unit of scheduling; here, as in Sarathi
(Agrawal et al., 2023), a step holds one token of every sequence that writes and pieces of prompts.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from itertools import islice, takewhile
from operator import eq

import numpy as np
from numpy.typing import NDArray

from uq.kernels.session import BatchSession, Piece
from uq.serve.metrics import Metrics
from uq.serve.sequence import Sequence

PREFILL = 128  # prompt tokens in a step in which others write: they wait for it
SHARED = 16  # a shorter common beginning is not worth the rest of a KV cache
ROWS = 32  # rows of logits in memory at once: 32 MiB of Gemma's vocabulary

Place = tuple[Sequence, int]  # and the position of one of its tokens


class Scheduler:
    """Runs sequences on the slots of a session, first come, first served.

    A sequence gets the tokens that it would get alone: the session's bits and the random numbers
    depend on the sequence only.

    Attributes:
        waiting: sequences without a slot; `running`: slot -> sequence.
    """

    def __init__(self, session: BatchSession, metrics: Metrics) -> None:
        self._session, self._metrics = session, metrics
        self.waiting: deque[Sequence] = deque()
        self.running: dict[int, Sequence] = {}
        self._free = deque(range(session.slots))  # the least recently used first
        self._kept: list[list[int]] = [[] for _ in range(session.slots)]  # tokens in the KV caches

    @property
    def idle(self) -> bool:
        return not self.waiting and not self.running

    @property
    def free(self) -> int:
        """Slots that nobody has."""
        return len(self._free)

    def step(self) -> None:
        """Run one piece of every sequence that has its turn.

        Whatever goes wrong in it ends the sequences that run, not the scheduler.
        """
        self._drop_gone()
        self._admit()
        pieces = list(self._pieces())
        if not pieces:
            return
        try:
            self._run(pieces)
        except Exception as error:  # nobody knows what the caches hold now
            self._abandon(f"{type(error).__name__}: {error}")
            raise

    def end_all(self, reason: str) -> None:
        """Give up everything, waiting or running."""
        for sequence in self.waiting:
            sequence.fail(reason)
        self.waiting.clear()
        self._abandon(reason)

    def _run(self, pieces: list[Piece]) -> None:
        places = [
            (self.running[slot], self._session.length(slot) + index)
            for slot, tokens in pieces
            for index in range(len(tokens))
        ]
        hidden = self._session.extend(pieces)
        wanted = [row for row, (sequence, at) in enumerate(places) if sequence.wants(at)]
        scored = [row for row in wanted if places[row][0].job.logprobs is not None]
        others = [row for row in wanted if places[row][0].job.logprobs is None]
        self._choose(hidden[others], [places[row] for row in others])
        for first in range(0, len(scored), ROWS):
            rows = scored[first : first + ROWS]
            self._score(hidden[rows], [places[row] for row in rows])
        self._metrics.width.observe(len(pieces))
        for slot, _ in pieces:
            self._settle(slot)

    def _choose(self, hidden: NDArray[np.float32], places: list[Place]) -> None:
        """The next token of sequences that are asked for nothing else."""
        if places:
            samplings = [sequence.job.sampling for sequence, _ in places]
            positions = [position + 1 for _, position in places]
            tokens = self._session.choose(hidden, samplings, positions)
            for (sequence, _), token in zip(places, tokens, strict=True):
                sequence.append(token)

    def _score(self, hidden: NDArray[np.float32], places: list[Place]) -> None:
        """The probabilities of tokens that are there or are chosen."""
        logits = self._session.logits(hidden, 0, self._session.config.vocab_size)
        for (sequence, position), values in zip(places, logits, strict=True):
            sequence.receive(position, values)

    def _settle(self, slot: int) -> None:
        """Report, and free the slot of a sequence that is over."""
        sequence = self.running[slot]
        if self._session.length(slot) == len(sequence.tokens):
            sequence.complete()
        if sequence.generated == 1:
            self._metrics.first_token.observe(time.perf_counter() - sequence.arrived)
        sequence.report()
        if sequence.finish is not None:
            self._release(slot)

    def _pieces(self) -> Iterator[Piece]:
        """One token of each that writes, then prompts, the oldest first, as far as they fit."""
        rests = {
            slot: sequence.tokens[self._session.length(slot) :]
            for slot, sequence in self.running.items()
        }
        writing = [slot for slot in rests if self.running[slot].generated]
        yield from (Piece(slot, rests[slot]) for slot in writing)
        budget = self._session.block - len(writing)
        budget = min(budget, PREFILL) if writing else budget
        for slot, rest in rests.items():
            if slot not in writing and budget > 0:
                yield Piece(slot, rest[:budget])
                budget -= len(rest[:budget])

    def _admit(self) -> None:
        while self.waiting and self._free:
            sequence = self.waiting.popleft()
            slot, shared = self._best_slot(sequence)
            self._free.remove(slot)
            sequence.cached = self._session.rewind(slot, shared)
            self.running[slot] = sequence
            self._metrics.prompt.inc(len(sequence.job.prompt))
            self._metrics.cached.inc(sequence.cached)

    def _best_slot(self, sequence: Sequence) -> tuple[int, int]:
        """A free slot, and how many of its tokens the sequence begins with.

        The last token of a prompt is always computed: the first answer comes from it.
        """
        prompt = sequence.tokens[:-1]
        if sequence.job.scores_prompt:
            return self._free[0], 0
        shared = {slot: common(prompt, self._kept[slot]) for slot in self._free}
        best = max(shared, key=lambda slot: shared[slot])
        return (best, shared[best]) if shared[best] >= SHARED else (self._free[0], 0)

    def _release(self, slot: int) -> None:
        sequence = self.running.pop(slot)
        self._kept[slot] = sequence.tokens[: self._session.length(slot)]
        self._free.append(slot)
        self._metrics.generated.inc(sequence.generated)

    def _drop_gone(self) -> None:
        self.waiting = deque(sequence for sequence in self.waiting if not sequence.gone)
        for slot in [slot for slot, sequence in self.running.items() if sequence.gone]:
            self._release(slot)

    def _abandon(self, reason: str) -> None:
        for slot, sequence in list(self.running.items()):
            sequence.fail(reason)
            self._release(slot)
        for slot in range(self._session.slots):
            self._kept[slot] = []


def common(one: list[int], other: list[int]) -> int:
    """Length of the common beginning."""
    return sum(takewhile(bool, map(eq, islice(one, len(other)), other)))
