"""Several sequences of a bundle on a GPU. See `uq.kernels.session.BatchSession`.

Up to 16 tokens go through the layers with the bits that each has alone; on a GPU with matrix
instructions, up to 4 sequences. More of them share products that add in another order, so what a
sequence gets may differ in the last digits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from uq.errors import UsageError
from uq.formats.config import GemmaConfig
from uq.kernels.numerics import FLOAT, Numerics
from uq.kernels.session import Piece, Sampling, check_pieces, check_room
from uq.kernels.vulkan.device import PhysicalGpu
from uq.kernels.vulkan.engine import Engine
from uq.kernels.vulkan.mailbox import Run, Writer
from uq.kernels.vulkan.pace import Pace
from uq.kernels.vulkan.session import FIRST_PASS, describe
from uq.kernels.vulkan.state import MOST_SEQUENCES, MOST_STEPS
from uq.kernels.vulkan.weights import Source

Array = NDArray[np.float32]


class VulkanBatch:
    """A model on a GPU with many KV caches.

    Attributes:
        slots: number of sequences.
        block: tokens that one `extend` takes at most.
    """

    def __init__(
        self,
        config: GemmaConfig,
        source: Source,
        physical: PhysicalGpu,
        *,
        slots: int,
        pipeline_cache: Path,
        max_context: int = 4096,
        numerics: Numerics = FLOAT,
    ) -> None:
        """
        Args:
            pipeline_cache: folder in which the driver's compiled kernels are kept.

        Raises:
            DeviceError: the model and its caches do not fit, or the device fails.
            UsageError: `slots` or `max_context` is out of range, or the kernels have no such
                numerics.
        """
        if not 1 <= slots <= MOST_SEQUENCES:
            raise UsageError(f"{slots} sequences at a time on a GPU; use 1 to {MOST_SEQUENCES}")
        if max_context < 1:
            raise UsageError(f"a context of {max_context} tokens; it must hold at least 1")
        self.config, self.slots, self.max_context = config, slots, max_context
        self._engine = Engine(
            config, source, physical, pipeline_cache, max_context, slots=slots, numerics=numerics
        )
        self.device = describe(self._engine, numerics)
        self.close = self._engine.close
        self._runs = self._engine.runs(max_context, slots)
        self.block = max(self._engine.widest, slots)
        self._lengths, self._written = [0] * slots, [0] * slots
        self._pass, self._steps = Pace(FIRST_PASS, self._engine.widest), Pace(1, MOST_STEPS)

    @property
    def cache_bytes(self) -> int:
        return self._runs.cache.size.nbytes

    def length(self, slot: int) -> int:
        return self._lengths[slot]

    def rewind(self, slot: int, length: int) -> int:
        size, written = self._runs.cache.size, self._written[slot]
        kept = length <= self._lengths[slot] and size.holds(length, written)
        self._lengths[slot] = length if kept else 0
        if self._lengths[slot] == 0:
            self._written[slot] = 0  # what is seen from here on is written anew
        return self._lengths[slot]

    def extend(self, pieces: Sequence[Piece]) -> Array:
        check_pieces(pieces, self.block, self.config.vocab_size)
        for piece in pieces:
            check_room(len(piece.tokens), self.length(piece.slot), self.max_context)
        count = sum(len(piece.tokens) for piece in pieces)
        out = np.empty((count, self.config.hidden_size), np.float32)
        done = 0
        for runs in self._passes(pieces):
            tokens = sum(len(run.tokens) for run in runs)
            self._runs.tokens(runs)
            self._pass.took(tokens, self._runs.seconds)
            normed = self._engine.work.normed
            out[done : done + tokens] = self._engine.read_floats(normed, tokens, out.shape[1])
            done += tokens
            for run in runs:
                self._reach(run.slot, run.position + len(run.tokens))
        return out

    def logits(self, hidden: Array, start: int, stop: int) -> Array:
        return self._engine.logits(hidden, start, stop)

    def choose(
        self, hidden: Array, samplings: Sequence[Sampling], positions: Sequence[int]
    ) -> list[int]:
        chosen: list[int] = []
        for first in range(0, len(hidden), self.slots):
            rows = hidden[first : first + self.slots]
            self._engine.transfers.write(self._engine.work.normed, rows)
            writers = [
                Writer(0, position - 1, 0, sampling)
                for sampling, position in zip(samplings[first:], positions[first:], strict=True)
            ]
            chosen += self._runs.choose_rows(writers[: len(rows)])
        return chosen

    def write(self, firsts: Sequence[Piece], count: int, sampling: Sampling) -> NDArray[np.int64]:
        check_pieces(firsts, self.slots, self.config.vocab_size)
        for slot, _ in firsts:
            check_room(count, self.length(slot), self.max_context)
        out = np.empty((len(firsts), count), np.int64)
        following = [piece.tokens[-1] for piece in firsts]
        done = 0
        while done < count:
            steps = min(self._steps.size, count - done)
            writers = [
                Writer(piece.slot, self.length(piece.slot), token, sampling)
                for piece, token in zip(firsts, following, strict=True)
            ]
            rows, following = self._runs.steps(steps, writers, stops=())
            self._steps.took(steps, self._runs.seconds)
            out[:, done : done + steps - 1] = np.array(rows)[:, 1:]
            out[:, done + steps - 1] = following
            done += steps
            for writer in writers:
                self._reach(writer.slot, writer.position + steps)
        return out

    def _passes(self, pieces: Sequence[Piece]) -> Iterator[list[Run]]:
        """The pieces cut into passes that end soon enough."""
        runs: list[Run] = []
        room = self._pass.size
        for slot, tokens in pieces:
            start = 0
            while start < len(tokens):
                part = tokens[start : start + room]
                runs.append(Run(slot, self.length(slot), part))
                start, room = start + len(part), room - len(part)
                if room == 0:
                    yield runs
                    runs, room = [], self._pass.size
        if runs:
            yield runs

    def _reach(self, slot: int, length: int) -> None:
        self._lengths[slot] = length
        self._written[slot] = max(self._written[slot], length)
