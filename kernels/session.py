"""What every way of running a model offers: the float32 reference, the CPU, any later device."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from uq.errors import DeviceError, UsageError
from uq.formats.config import GemmaConfig
from uq.formats.decode import OPTIONAL
from uq.kernels.profile import StepTimes


@dataclass(frozen=True)
class AttentionPlace:
    """Where the attention of some layers runs, and why not on the device that was asked for.

    Attributes:
        layers: a number, or the first and the last with a dash between.
    """

    layers: str
    backend: str
    reason: str | None

    def __str__(self) -> str:
        layers = "layers" if "-" in self.layers else "layer"
        why = f": {self.reason}" if self.reason else ""
        return f"attention of {layers} {self.layers} on {self.backend}{why}"


@dataclass(frozen=True)
class Device:
    """Where a session runs, as the report prints it.

    Attributes:
        attention: of sessions that share a model between devices; else empty.
    """

    backend: str
    name: str
    driver: str
    features: tuple[str, ...] = ()
    attention: tuple[AttentionPlace, ...] = field(default=(), metadata=OPTIONAL)

    @property
    def has_clock(self) -> bool:
        """Whether rates measured on it say anything of a device."""
        return self.backend != "npu-emulator"


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. `temperature == 0` is greedy and ignores the rest.

    The random number for position `p` depends on `(seed, p)` alone, so the same seed gives the same
    text however the tokens are batched into calls.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class Arithmetic:
    """How fast a device multiplies and adds: `rate` operations a second with what `kind` names."""

    kind: str
    rate: float


class Probe(Protocol):
    """Measures a device that has a memory or a clock of its own."""

    def read_bandwidth(self) -> float:
        """Bytes per second that its kernels read from its memory, measured now."""
        ...

    def arithmetic(self) -> Arithmetic:
        """Of what its products of many tokens are made of, measured now."""
        ...

    @property
    def operations_per_token(self) -> int:
        """Products and sums of the linears for a token of a prompt, the head's left out."""
        ...

    def profile(self) -> StepTimes:
        """Time the kernels of the next decode step; the sequence stays as it is.

        Raises:
            UsageError: there is no token, or no room for one more.
        """
        ...


class Session(Protocol):
    """An opened model with one KV cache.

    `score` and `logits` are for validation and leave the KV cache alone; `prefill` and `decode`
    extend one sequence.
    """

    @property
    def config(self) -> GemmaConfig: ...

    @property
    def device(self) -> Device: ...

    @property
    def probe(self) -> Probe | None:
        """None on the processor that runs uq itself."""
        ...

    @property
    def bytes_per_token(self) -> int:
        """Weight bytes read to decode one token (one embedding row, every linear, the head)."""
        ...

    @property
    def max_context(self) -> int: ...

    @property
    def position(self) -> int:
        """Number of tokens in the KV cache."""
        ...

    def score(self, tokens: NDArray[np.int32]) -> NDArray[np.float32]:
        """Hidden states after the final norm.

        Args:
            tokens: (batch, length) int32; sequences are independent, positions start at 0.

        Returns:
            (batch, length, hidden) float32.
        """
        ...

    def logits(self, hidden: NDArray[np.float32], start: int, stop: int) -> NDArray[np.float32]:
        """Logits of vocabulary rows `start:stop`, soft-capped where the model does.

        Args:
            hidden: (n, hidden) float32, as `score` returns them.

        Returns:
            (n, stop - start) float32.
        """
        ...

    def reset(self) -> None:
        """Empty the KV cache."""
        ...

    def prefill(self, tokens: Sequence[int]) -> None:
        """Append tokens to the KV cache and compute the logits behind the last of them.

        Raises:
            UsageError: the context would grow past `max_context`, or a token id is not in the
                vocabulary.
        """
        ...

    def decode(self, count: int, sampling: Sampling) -> Iterator[int]:
        """Yield up to `count` tokens, each sampled and appended; stops early at `max_context`.

        End-of-sequence tokens are yielded like any other: stopping is the caller's decision.
        """
        ...


class Piece(NamedTuple):
    """New tokens of the sequence in `slot`."""

    slot: int
    tokens: Sequence[int]


class BatchSession(Protocol):
    """An opened model with several sequences, each in a slot with a KV cache of its own.

    What a sequence gets does not depend on the others, nor on how its tokens are cut into pieces:
    on the CPU to the bit, on a GPU up to rounding.

    Attributes:
        slots: number of sequences.
        block: tokens that one `extend` takes at most.
        max_context: tokens that each KV cache can hold.
    """

    slots: int
    block: int
    max_context: int

    @property
    def config(self) -> GemmaConfig: ...

    @property
    def device(self) -> Device: ...

    @property
    def cache_bytes(self) -> int:
        """Size of all KV caches when they are full."""
        ...

    def length(self, slot: int) -> int:
        """Number of tokens in a KV cache."""
        ...

    def rewind(self, slot: int, length: int) -> int:
        """Forget the tokens from `length` on, or all where a sliding window needs lost ones.

        Returns:
            The number of tokens that are left: `length` or 0.
        """
        ...

    def extend(self, pieces: Sequence[Piece]) -> NDArray[np.float32]:
        """Append tokens to several sequences, of each slot one piece at most.

        Returns:
            (tokens of all pieces, hidden) float32 after the final norm, in the order of the pieces;
            valid until the next call.

        Raises:
            UsageError: a token is not in the vocabulary, or they do not fit.
        """
        ...

    def logits(self, hidden: NDArray[np.float32], start: int, stop: int) -> NDArray[np.float32]:
        """As `Session.logits`."""
        ...

    def choose(
        self,
        hidden: NDArray[np.float32],
        samplings: Sequence[Sampling],
        positions: Sequence[int],
    ) -> list[int]:
        """Sample the token that follows each of some rows.

        Args:
            hidden: (n, hidden) float32, as `extend` returns them.
            samplings: one for each row.
            positions: number of tokens in front of each token that is chosen.
        """
        ...

    def write(self, firsts: Sequence[Piece], count: int, sampling: Sampling) -> NDArray[np.int64]:
        """Append a token to each of several sequences, and the `count - 1` that follow it.

        Args:
            firsts: the first token of each sequence.

        Returns:
            (sequences, count) the tokens that follow, the last of which is not appended yet.

        Raises:
            UsageError: as `extend`.
        """
        ...


def check_pieces(pieces: Sequence[Piece], most: int, vocab_size: int) -> None:
    """Refuse a step that no session can run.

    Args:
        most: tokens that fit into it.

    Raises:
        UsageError: there is no token, one is not in the vocabulary, there are too many, or two
            pieces are of one sequence.
    """
    tokens = np.concatenate([np.asarray(piece.tokens, np.int32) for piece in pieces])
    check_tokens(tokens, vocab_size)
    if len({piece.slot for piece in pieces}) < len(pieces):
        raise UsageError("two pieces of one step belong to the same slot; join them")
    if tokens.size > most:
        raise UsageError(f"{tokens.size} tokens in one step; at most {most} fit")


def check_tokens(tokens: NDArray[np.int32], vocab_size: int) -> None:
    """Refuse what no session can run.

    Raises:
        UsageError: there is no token, or one is not in the vocabulary.
    """
    if tokens.size == 0:
        raise UsageError("there are no tokens to run; give at least one")
    outside = tokens[(tokens < 0) | (tokens >= vocab_size)]
    if outside.size:
        raise UsageError(
            f"token {outside[0]} is not in the vocabulary of {vocab_size}; "
            "use the model's own tokenizer"
        )


def require_known(config: GemmaConfig, what: str, remedy: str, known: Collection[str] = ()) -> None:
    """Refuse a model whose layers have more than a device computes.

    Args:
        what: the device; `remedy`: what to do instead.
        known: of the names in `GemmaConfig.extensions`, those that it computes.

    Raises:
        DeviceError: names the first option that the device does not compute.
    """
    if unknown := [option for option in config.extensions() if option not in known]:
        raise DeviceError(f"{what} does not compute {unknown[0]} ({config.family}); {remedy}")


def require_context(what: str, needed: int, config: GemmaConfig) -> None:
    """Raises UsageError: `what` takes more tokens than the model's context has."""
    if needed > (limit := config.max_position_embeddings):
        raise UsageError(f"{what}: {needed} tokens, but the model's context has {limit}")


def check_room(count: int, position: int, max_context: int) -> None:
    """Refuse to grow a context past its end.

    Raises:
        UsageError: `count` more tokens do not fit behind `position`.
    """
    if count > max_context - position:
        raise UsageError(
            f"{count} tokens do not fit behind {position} in a context of {max_context}; "
            "shorten the text or raise the maximum context"
        )
