"""Runs a bundle on a GPU through Vulkan. See `uq.kernels.session.Session`.

The residual stream, norms and sums are float32; the input of every linear is 16-bit fixed point or
INT8, scaled for each 32 channels; keys and values are float16 or INT8. Prompts run many tokens at a
time; where the device has matrix instructions, both sides of their products are float16. A decode
step is recorded once and replayed: token and position live on the device, several steps are one
submit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import takewhile
from operator import eq
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from uq.errors import UsageError
from uq.formats.config import GemmaConfig
from uq.kernels.numerics import FLOAT, Numerics
from uq.kernels.profile import StepTimes
from uq.kernels.session import Arithmetic, Device, Probe, Sampling, check_room, check_tokens
from uq.kernels.vulkan.arithmetic import arithmetic_of, measure
from uq.kernels.vulkan.bandwidth import read_bandwidth
from uq.kernels.vulkan.device import PhysicalGpu
from uq.kernels.vulkan.drafts import Drafts
from uq.kernels.vulkan.engine import Engine
from uq.kernels.vulkan.mailbox import Run, Writer
from uq.kernels.vulkan.model import COLUMNS
from uq.kernels.vulkan.pace import Pace
from uq.kernels.vulkan.runs import Runs
from uq.kernels.vulkan.state import MOST_STEPS, MOST_STOPS, MOST_TOKENS
from uq.kernels.vulkan.weights import Source
from uq.kernels.vulkan.wide import Abilities

Array = NDArray[np.float32]

GREEDY = Sampling()
FEW_GUESSES, MOST_GUESSES = 3, COLUMNS - 1  # with the token before them a pass of few tokens
FIRST_PASS = 64  # tokens of a pass, until it is known how long that takes


class VulkanSession:
    """A model on a GPU with one KV cache."""

    def __init__(
        self,
        config: GemmaConfig,
        source: Source,
        physical: PhysicalGpu,
        *,
        pipeline_cache: Path,
        max_context: int = 4096,
        widest: int = MOST_TOKENS,
        tune: bool = False,
        numerics: Numerics = FLOAT,
        speculate: bool = False,
    ) -> None:
        """
        Args:
            pipeline_cache: folder in which the driver's compiled kernels are kept.
            widest: tokens that may run through the layers together.
            tune: first measure how products are best cut into workgroups on this device; the
                result is kept in the same folder.
            speculate: check several guessed tokens in one pass where the text repeats itself.
                Greedy text stays what it is: a token of a pass has the bits that it has alone,
                because every sum has an order of its own (shaders/gemv.comp).
            numerics: with INT8 keys and values, half the memory and half the reads of a context;
                with INT8 activations, half the integer dot products of every linear.

        Raises:
            DeviceError: the model does not fit, or the device fails.
            UsageError: `max_context` is out of range, or the kernels have no such numerics.
        """
        if max_context < 1:
            raise UsageError(f"a context of {max_context} tokens; it must hold at least 1")
        self.config, self.max_context = config, max_context
        self._physical, self._pipeline_cache = physical, pipeline_cache
        self._numerics = numerics
        self._engine = Engine(
            config, source, physical, pipeline_cache, max_context, widest, numerics=numerics
        )
        self.device = describe(self._engine, numerics)
        self.close = self._engine.close
        if tune:
            self._engine.tune()
        self._runs = self._engine.runs(max_context)
        self._scratch: Runs | None = None  # of `score`
        self._stops = config.eos_token_ids[:MOST_STOPS]
        self._steps, self._pass = Pace(1, MOST_STEPS), Pace(FIRST_PASS, self._engine.widest)
        self._position, self._last = 0, 0  # tokens in the cache, and the last of them
        self._choice = 0  # the token behind it, and how it was chosen
        self._chosen = GREEDY
        self._has_logits = False
        self._drafts = Drafts() if speculate else None
        self._ahead = FEW_GUESSES

    @property
    def bytes_per_token(self) -> int:
        model = self._engine.model
        return model.table.nbytes // self.config.vocab_size + model.product_bytes

    @property
    def position(self) -> int:
        return self._position

    @property
    def next_logits(self) -> Array:
        """(vocab,) behind the last token of the KV cache.

        Raises:
            UsageError: the cache is empty.
        """
        self._require_prompt()
        self._restore_logits()
        found = self._engine.read_floats(self._engine.work.logits, 1, self.config.vocab_size)
        return found.reshape(-1)

    def score(self, tokens: NDArray[np.int32]) -> Array:
        check_tokens(tokens, self.config.vocab_size)
        batch, length = tokens.shape
        runs, normed = self._scratch_for(length), self._engine.work.normed
        out = np.empty((batch, length, self.config.hidden_size), np.float32)
        for sequence, hidden in zip(tokens.tolist(), out, strict=True):
            done = 0
            while done < length:
                piece = self._run_pass(runs, sequence, done, done)
                found = self._engine.read_floats(normed, piece, self.config.hidden_size)
                hidden[done : done + piece] = found
                done += piece
        return out

    def logits(self, hidden: Array, start: int, stop: int) -> Array:
        return self._engine.logits(hidden, start, stop)

    def reset(self) -> None:
        self._position, self._has_logits = 0, False
        if self._drafts:
            self._drafts.cut(0)

    def prefill(self, tokens: Sequence[int]) -> None:
        ids = np.asarray(tokens, np.int32)
        check_tokens(ids, self.config.vocab_size)
        check_room(ids.size, self._position, self.max_context)
        done = 0
        while done < ids.size:
            piece = self._run_pass(self._runs, ids.tolist(), done, self._position, head=True)
            self._position += piece
            done += piece
        self._know(int(ids[-1]), self._engine.mailbox.choices(1)[0], GREEDY)
        if self._drafts:
            self._drafts.add(ids.tolist())

    def decode(self, count: int, sampling: Sampling) -> Iterator[int]:
        sampling = GREEDY if sampling.temperature == 0 else sampling
        while count > 0:
            self._require_prompt()
            room = min(count, self.max_context - self._position)
            if room == 0:
                return
            tokens = self._next(room, sampling)
            count -= len(tokens)
            for used, token in enumerate(tokens, 1):
                try:
                    yield token
                except GeneratorExit:
                    self._take_back(tokens, used)
                    raise

    @property
    def probe(self) -> Probe:
        return self

    def read_bandwidth(self) -> float:
        """Bytes per second.

        Raises:
            DeviceError: the device fails, or has no memory left beside the model.
        """
        return read_bandwidth(self._physical, self._pipeline_cache)

    def arithmetic(self) -> Arithmetic:
        """
        Raises:
            DeviceError: the device fails.
        """
        kind = self._engine.model.layers[0].down.kind
        product = Abilities.of(self._physical).module(kind)
        return measure(self._physical, self._pipeline_cache, arithmetic_of(product))

    @property
    def operations_per_token(self) -> int:
        """Inputs of 16 bits meet the integer dot product as two of 8 bits."""
        linears = self._engine.model.matrices
        kind = self._engine.model.layers[0].down.kind
        product = Abilities.of(self._physical).module(kind)
        passes = 2 if product.endswith("_dot") and not self._numerics.activations else 1
        return 2 * passes * sum(matrix.rows * matrix.cols for matrix in linears)

    def profile(self) -> StepTimes:
        """Time the kernels of the next decode step; the sequence stays as it is.

        Raises:
            UsageError: there is no token, or no room for one more.
        """
        self._require_prompt()
        check_room(1, self._position, self.max_context)
        self._has_logits = False
        return self._runs.profile(Writer(0, self._position, self._last))

    def _run_pass(
        self, runs: Runs, tokens: list[int], done: int, position: int, *, head: bool = False
    ) -> int:
        """Run the next of `tokens` behind the first `done`; with `head` logits behind the last.

        Returns:
            How many ran.
        """
        piece = tokens[done : done + self._pass.size]
        runs.tokens([Run(0, position, piece)], head=head and done + len(piece) == len(tokens))
        self._pass.took(len(piece), runs.seconds)
        return len(piece)

    def _next(self, room: int, sampling: Sampling) -> list[int]:
        """Append one token or more, up to `room`."""
        self._choose(sampling)
        if self._drafts is None or sampling != GREEDY:
            return self._write(min(room, self._steps.size), sampling)
        guess = self._drafts.guess(self._choice, min(self._ahead, room - 1))
        tokens = self._check(guess) if guess else self._write(1, sampling)
        self._drafts.add(tokens)
        return tokens

    def _check(self, guess: list[int]) -> list[int]:
        """Append the next token and as much of the guess behind it as is what would follow."""
        tokens = [self._choice, *guess]
        choices = self._runs.choices(Run(0, self._position, tokens))
        right = sum(takewhile(bool, map(eq, guess, choices)))
        self._ahead = MOST_GUESSES if right == len(guess) else FEW_GUESSES
        self._position += 1 + right
        self._know(tokens[right], choices[right], GREEDY)
        self._has_logits = False  # those of the first token lie where they are looked for
        return tokens[: 1 + right]

    def _write(self, steps: int, sampling: Sampling) -> list[int]:
        """Append up to `steps` tokens, fewer where one of them ends the text."""
        writer = Writer(0, self._position, self._choice, sampling)
        (tokens,), (choice,) = self._runs.steps(steps, [writer], self._stops)
        self._steps.took(steps, self._runs.seconds)
        self._position += len(tokens)
        self._know(tokens[-1], choice, sampling)
        return tokens

    def _choose(self, sampling: Sampling) -> None:
        """Let the next token be one that is chosen in this way."""
        if self._chosen != sampling:
            self._restore_logits()
            self._choice = self._runs.draw(Writer(0, self._position - 1, self._last, sampling))
            self._chosen = sampling

    def _restore_logits(self) -> None:
        """Compute the logits behind the last token again, where something has overwritten them."""
        if not self._has_logits:
            self._runs.tokens([Run(0, self._position - 1, [self._last])], head=True)
            self._has_logits = True

    def _know(self, last: int, choice: int, chosen: Sampling) -> None:
        """The last submit ended with token `last` and left its logits."""
        self._last, self._choice, self._chosen, self._has_logits = last, choice, chosen, True

    def _take_back(self, tokens: list[int], used: int) -> None:
        """Forget the tokens behind the first `used` ones: nobody asked for them."""
        if used < len(tokens):
            self._position -= len(tokens) - used
            self._last, self._choice, self._has_logits = tokens[used - 1], tokens[used], False
            if self._drafts:
                self._drafts.cut(self._position)

    def _require_prompt(self) -> None:
        if self._position == 0:
            raise UsageError("decode needs at least one token before it; call prefill first")

    def _scratch_for(self, length: int) -> Runs:
        if self._scratch is None or self._scratch.cache.size.capacity < length:
            self._scratch = self._engine.runs(length)
        return self._scratch


def describe(engine: Engine, numerics: Numerics) -> Device:
    """What the device offers to the kernels, what they keep in integers, where the weights lie."""
    physical = engine.gpu.physical
    features = [ability.name for ability in physical.ladder if ability.present]
    features += ["INT8 activations"] * (numerics.activations is not None)
    features += ["INT8 keys and values"] * (numerics.kv is not None)
    features.append(str(engine.placement))
    return Device("vulkan", physical.name, physical.driver, tuple(features))
