"""Several sequences through one model: their tokens share every matrix product.

A sequence gets the bits that `CpuSession` gives it alone: the products treat tokens as if each were
alone, and so does attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
from numba import get_thread_id, prange
from numpy.typing import NDArray

from uq.errors import UsageError
from uq.formats.config import GemmaConfig
from uq.kernels.cpu.attention import attend_tile
from uq.kernels.cpu.cache import KVCache, layer_shapes
from uq.kernels.cpu.elementwise import enter_token, per_token
from uq.kernels.cpu.layout import WeightSource
from uq.kernels.cpu.model import Array, Layer, Work
from uq.kernels.cpu.session import CpuSession
from uq.kernels.cpu.tiles import TILE_ROWS
from uq.kernels.elementwise import kernel
from uq.kernels.sampling import sample
from uq.kernels.session import Piece, Sampling, check_pieces, check_room

Whole = NDArray[np.int64]

ROWS = 32  # rows of logits in memory at once: 32 MiB of Gemma's vocabulary


class Step(NamedTuple):
    """Where the tokens of one `extend` belong.

    Attributes:
        places: (tokens, 2) slot and position of each token.
        runs: (runs, 4) slot, first token, tokens, position of the first: as many neighbours as fill
            a register tile.
    """

    places: Whole
    runs: Whole


class CpuBatch(CpuSession):
    """A quantized model on the CPU with many KV caches. See `uq.kernels.session.BatchSession`.

    The methods of `CpuSession` work beside, on a cache of their own.
    """

    def __init__(
        self,
        config: GemmaConfig,
        source: WeightSource,
        *,
        slots: int,
        max_context: int = 4096,
        threads: int | None = None,
    ) -> None:
        """
        Raises:
            UsageError: `slots`, `threads` or `max_context` is out of range.
        """
        super().__init__(config, source, max_context=max_context, threads=threads)
        if not 1 <= slots <= self._block:
            raise UsageError(
                f"{slots} sequences at a time; use 1 to {self._block} for contexts of "
                f"{max_context} tokens"
            )
        self.slots, self.block = slots, self._block
        shapes = layer_shapes(config, max_context, self._block)
        self._keys, self._values = (
            [np.zeros((slots, *shape), np.float32) for shape in kind] for kind in shapes
        )
        self._caches = [self._slot(slot) for slot in range(slots)]
        self._lost = [0] * slots  # positions whose keys were overwritten in rings since the last 0

    @property
    def cache_bytes(self) -> int:
        return sum(array.nbytes for array in (*self._keys, *self._values))

    def length(self, slot: int) -> int:
        return self._caches[slot].position

    def rewind(self, slot: int, length: int) -> int:
        cache = self._caches[slot]
        cache.position = length if self._is_kept(slot, length) else 0
        if cache.position == 0:
            self._lost[slot] = 0
        return cache.position

    def extend(self, pieces: Sequence[Piece]) -> Array:
        check_pieces(pieces, self.block, self.config.vocab_size)
        for piece in pieces:
            check_room(len(piece.tokens), self.length(piece.slot), self.max_context)
        tokens = np.concatenate([np.asarray(piece.tokens, np.int32) for piece in pieces])
        self._begin(tokens)
        if len(pieces) == 1:
            normed = self._extend(tokens, self._caches[pieces[0].slot]).normed
        else:
            step = self._step(pieces)
            normed = self._forward(tokens, partial(self._attend_step, step)).normed
            for piece in pieces:
                self._caches[piece.slot].position += len(piece.tokens)
        for piece in pieces:
            lost = self.length(piece.slot) - self._ring
            self._lost[piece.slot] = max(self._lost[piece.slot], lost)
        return normed

    def choose(
        self, hidden: Array, samplings: Sequence[Sampling], positions: Sequence[int]
    ) -> list[int]:
        chosen: list[int] = []
        for first in range(0, len(hidden), ROWS):
            rows = np.ascontiguousarray(hidden[first : first + ROWS])
            logits = self.logits(rows, 0, self.config.vocab_size)
            places = zip(logits, samplings[first:], positions[first:], strict=False)
            chosen += [sample(values, sampling, position) for values, sampling, position in places]
        return chosen

    def write(self, firsts: Sequence[Piece], count: int, sampling: Sampling) -> Whole:
        out = np.empty((len(firsts), count), np.int64)
        pieces = firsts
        for step in range(count):
            hidden = self.extend(pieces)
            positions = [self.length(piece.slot) for piece in pieces]
            out[:, step] = self.choose(hidden, [sampling] * len(firsts), positions)
            pieces = [
                Piece(piece.slot, [token])
                for piece, token in zip(firsts, out[:, step].tolist(), strict=True)
            ]
        return out

    def _slot(self, slot: int) -> KVCache:
        """A view of one sequence's keys and values."""
        return KVCache([k[slot] for k in self._keys], [v[slot] for v in self._values])

    @property
    def _ring(self) -> int:
        """Slots of a layer with a window, or of all where none has one."""
        rings = [
            values.shape[3]
            for layer, values in enumerate(self._values)
            if self.config.window(layer) is not None and self.config.kv_source(layer) == layer
        ]
        return min(rings, default=self.max_context)

    def _is_kept(self, slot: int, length: int) -> bool:
        """Whether all that a token at `length` sees is still there.

        A sequence that was rewound before is shorter than what was written: it does not tell.
        """
        lost, windows = self._lost[slot], map(self.config.window, range(self.config.num_layers))
        widest = max((window for window in windows if window is not None), default=1)
        return length <= self.length(slot) and (lost == 0 or length + 1 - widest >= lost)

    def _step(self, pieces: Sequence[Piece]) -> Step:
        layers = range(self.config.num_layers)
        fewest = min(self.config.layer_kv_heads(layer) for layer in layers)
        width = max(1, TILE_ROWS // (self.config.num_heads // fewest))
        places: list[tuple[int, int]] = []
        runs: list[tuple[int, int, int, int]] = []
        for slot, tokens in pieces:
            start, count = self.length(slot), len(tokens)
            for first in range(0, count, width):
                run = min(width, count - first)
                runs.append((slot, len(places) + first, run, start + first))
            places += [(slot, start + index) for index in range(count)]
        return Step(np.array(places, np.int64), np.array(runs, np.int64))

    def _attend_step(self, step: Step, layer: Layer, index: int, work: Work) -> None:
        """work.context = attention of work.qkv, each token over its own sequence."""
        config = self.config
        keys, values = self._keys[layer.source], self._values[layer.source]
        queries = work.queries.reshape(layer.kv_heads, -1, layer.head_dim)
        turns = layer.rope.rows(0, int(step.places[:, 1].max()) + 1)
        gains, eps = layer.head_gains, np.float32(config.rms_norm_eps)
        enter_places(work.qkv, layer.columns, gains, eps, turns, step.places, queries, keys, values)
        scale, cap = np.float32(config.attention_scale), np.float32(config.attn_softcap or 0.0)
        seen = (step.runs, layer.window)
        attend_runs(queries, keys, values, *seen, scale, cap, self._scratch, work.context)


@per_token
def enter_places(
    qkv: NDArray[np.float32],
    columns: tuple[int, int, int],
    gains: tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]],
    eps: np.float32,
    turns: tuple[NDArray[np.float32], NDArray[np.float32]],
    places: NDArray[np.int64],
    queries: NDArray[np.float32],
    keys: NDArray[np.float32],
    values: NDArray[np.float32],
) -> None:
    """`enter_attention` of tokens of many sequences.

    Args:
        turns: cos and sin of all positions, each (positions, dim / 2).
        places: as in `Step`.
        keys, values: of a layer of all caches; the first axis is the slot.
    """
    for token in prange(qkv.shape[0]):
        slot, position = places[token]
        turn = (turns[0][position], turns[1][position])
        mine = (keys[slot], values[slot])
        enter_token(token, qkv, columns, gains, eps, turn, position, queries, *mine)


@kernel(parallel=True)
def attend_runs(
    queries: NDArray[np.float32],
    keys: NDArray[np.float32],
    values: NDArray[np.float32],
    runs: NDArray[np.int64],
    window: int,
    scale: np.float32,
    cap: np.float32,
    scratch: NDArray[np.float32],
    context: NDArray[np.float32],
) -> None:
    """`attend_many` for tokens of many sequences.

    Args:
        queries: (kv_heads, tokens * group, dim) float32.
        keys, values: as in `enter_places`.
        runs: as in `Step`.
    """
    kv_heads, rows, dim = queries.shape
    group = rows // context.shape[0]
    for item in prange(len(runs) * kv_heads):
        head = item % kv_heads
        slot, first, tokens, position = runs[item // kv_heads]
        tile = queries[head, first * group : (first + tokens) * group]
        mine, seen = scratch[get_thread_id()], (0, group, position, window)
        mixed = attend_tile(tile, keys[slot, head], values[slot, head], *seen, scale, cap, mine)
        for row in range(tokens * group):
            column = (head * group + row % group) * dim
            context[first + row // group, column : column + dim] = mixed[row, :dim]
