"""Gemma's layer over many tokens on a device, staged as in kernels/reference.py.

Inputs of linears and weights are float16 times a power of two that keeps them far from overflow,
whatever the tokens: it comes from bounds of what a norm and the rows of a weight allow. Sums and
the residual stream are float32.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from uq.formats.config import GemmaConfig
from uq.kernels import reference
from uq.kernels.attention import rope_tables
from uq.kernels.per_layer import Beside
from uq.kernels.vulkan.dense.cells import Cell, Cells, Row
from uq.kernels.vulkan.dense.matrix import TILE, Matrix, Store, padded
from uq.kernels.vulkan.dense.products import Batch, Products
from uq.kernels.vulkan.dense.stream import Stream
from uq.kernels.vulkan.memory import Span
from uq.kernels.vulkan.push import addresses, words

Array = NDArray[np.float32]
TOP = 2.0**13  # what float16 values stay below, times 8
LANES = 64
SOFTMAX = 1024  # attention weights are stored times this
MARGIN = 2.0  # of bounds, for weights that were quantized since


@dataclass(frozen=True)
class Linear:
    """A weight of the layer.

    Attributes:
        half: (rows, n) float16, the weight times `factor`.
        norms: (rows,) Euclidean norms of the rows.
    """

    half: Matrix
    factor: float
    norms: Array


@dataclass(frozen=True)
class Tokens:
    """Float16 numbers times `factor`; mostly inputs of a linear, (tokens, n)."""

    half: Matrix
    factor: float


KeysValues = tuple[Tokens, Tokens]


@dataclass(frozen=True)
class Chunk:
    """Some sequences of one length.

    Attributes:
        hidden: (tokens, hidden) float32, the residual stream.
        beside: what the host keeps of them.
    """

    hidden: Matrix
    sequences: int
    length: int
    beside: Beside = field(default_factory=Beside)

    @property
    def tokens(self) -> int:
        return self.sequences * self.length


class Layer:
    """One layer's weights on one path, and the way of tokens through it.

    Attributes:
        number: of the layer.
        name: of the path.
    """

    def __init__(
        self,
        config: GemmaConfig,
        number: int,
        name: str,
        tools: tuple[Stream, Store, Products, Cells],
    ) -> None:
        """`name` keeps the weights of two paths apart."""
        self._config, self.number, self.name = config, number, name
        self._dim, self._kv_heads = config.layer_head_dim(number), config.layer_kv_heads(number)
        self._stream, self._store, self._products, self._cells = tools
        self._linears: dict[str, Linear] = {}
        self._gains: dict[str, Array] = {}
        self._gain_spans: dict[str, Span] = {}

    def set_gains(self, weights: Mapping[str, Array]) -> None:
        """Role -> (size,) gain; linears are left out."""
        for role, value in weights.items():
            if value.ndim == 1:
                self._gains[role] = value
                self._gain_spans[role] = self._store.vector(f"{self.name} {role}", value)

    def set_linears(self, weights: Mapping[str, Array]) -> dict[int, Matrix]:
        """Role -> (out, in) linear; what is none is left out.

        Returns:
            id of an array -> what was made of it, float32.
        """
        placed = {}
        for role in (role for role in self._config.linear_shapes(self.number) if role in weights):
            value = weights[role]
            placed[id(value)] = self._store.put(f"weight {role}", value)
            self._set_linear(role, placed[id(value)])
        return placed

    def _set_linear(self, role: str, weight: Matrix) -> None:
        norms, peak = row_norms(self._cells, self._store, weight)
        half = self._store.matrix(f"{self.name} {role}", weight.rows, weight.cols, "f16")
        factor = power_below(TOP, peak)
        self._cells.run(Cell.COPY, half, weight, alpha=factor)
        self._linears[role] = Linear(half, factor, norms)

    def adopt(self, role: str, weight: Tokens, other: Layer) -> None:
        """A quantized weight that is on the device: (out, in) float16 times its factor.

        Args:
            other: has the weight that it was made of, whose norms it keeps within `MARGIN`.
        """
        norms = other._linears[role].norms
        self._linears[role] = Linear(weight.half, weight.factor, norms)

    def attention_input(self, chunk: Chunk) -> Tokens:
        return self._normed(chunk.hidden, "input_layernorm")

    def mlp_input(self, chunk: Chunk) -> Tokens:
        return self._normed(chunk.hidden, self._mlp_norm)

    def input_change(self, chunk: Chunk, other: Chunk, *, mlp: bool) -> Tokens:
        """Input of this path's linears less that of `other`'s."""
        role = self._mlp_norm if mlp else "input_layernorm"
        return self._normed(chunk.hidden, role, other.hidden)

    @property
    def _mlp_norm(self) -> str:
        name = "pre_feedforward_layernorm" if self._config.post_norms else None
        return name or "post_attention_layernorm"

    def _largest_input(self, role: str) -> float:
        """Bound of the Euclidean norm of a token behind a norm."""
        return math.sqrt(self._config.hidden_size) * float(np.abs(self._gains[role]).max())

    def _normed(self, hidden: Matrix, role: str, other: Matrix | None = None) -> Tokens:
        factor = power_below(TOP, (2 if other else 1) * self._largest_input(role))
        name = "normed change" if other else "normed"
        half = self._store.matrix(name, hidden.rows, hidden.cols, "f16", spare=TILE)
        self._cells.rows(
            Row.NORM_CHANGE if other else Row.NORM,
            half.span,
            half.stride,
            hidden,
            other=other,
            gain=self._gain_spans[role],
            eps=self._config.rms_norm_eps,
            factor=factor,
        )
        return Tokens(half, factor)

    def linear(self, role: str, x: Tokens, name: str) -> Matrix:
        """(tokens, out) float32 in the store's matrix `name`."""
        weight = self._linears[role]
        y = self._store.matrix(name, x.half.rows, weight.half.rows)
        alpha = 1.0 / (x.factor * weight.factor)
        self._products.multiply(y, x.half, weight.half, alpha=alpha)
        return y

    def keys(self, chunk: Chunk, x: Tokens, names: Sequence[str]) -> KeysValues:
        """Of the tokens, in the store's matrices `names`; `x` is `attention_input`."""
        k, v = (self._heads(what, x, chunk, name) for what, name in zip("kv", names, strict=True))
        return k, v

    def context(self, chunk: Chunk, x: Tokens, keys: KeysValues, name: str) -> Tokens:
        """Input of o_proj, in the store's matrix `name` of as many columns."""
        (k, v), q = keys, self._heads("q", x, chunk, "q heads")
        mixed = self._attend(chunk, q, k, v)
        heads, dim = self._config.num_heads, self._dim
        # Rows of another width would leave their numbers behind the tokens.
        result = self._store.matrix(f"{name} {heads * dim}", chunk.tokens, heads * dim, "f16")
        push = addresses(result.span, mixed.span)
        push += words(result.stride, heads, chunk.length, padded(chunk.length), mixed.stride)
        grid = (-(-result.stride // (2 * LANES)), chunk.tokens, 1)
        constants: dict[str, int | float] = {"LANES": LANES, "DIM": dim}
        self._stream.dispatch("dense_context", push + struct.pack("<f", 1.0), grid, constants)
        return Tokens(result, v.factor)

    def _attend(self, chunk: Chunk, q: Tokens, k: Tokens, v: Tokens) -> Matrix:
        """(sequences * heads * padded length, padded dim): softmax(Q K^T) V times V's factor."""
        config, store = self._config, self._store
        length, dim, heads = padded(chunk.length), padded(self._dim), config.num_heads
        rows = chunk.sequences * heads * length
        scores = store.matrix("scores", rows, length)
        weights = store.matrix("attention weights", rows, length, "f16")
        mixed = store.matrix("mixed", rows, dim)
        one_q, one_k, one_v = (part.half.block(0, 0, length, dim) for part in (q, k, v))
        one_score, one_weight = (m.block(0, 0, length, length) for m in (scores, weights))
        square, across = (heads * length**2, length**2), (heads * length * dim, length * dim)
        queries = (chunk.length * q.half.stride, dim)
        keys = (chunk.length * k.half.stride, dim)
        shape = (chunk.sequences, heads, heads // self._kv_heads)
        self._products.multiply(one_score, one_q, one_k, batch=Batch(*shape, queries, keys, square))
        self._softmax(scores, weights, chunk.length, 1.0 / (q.factor * k.factor))
        self._products.multiply(
            mixed.block(0, 0, length, dim),
            one_weight,
            one_v,
            alpha=1.0 / SOFTMAX,
            b_by_k=True,
            batch=Batch(*shape, square, keys, across),
        )
        return mixed

    def _heads(self, what: str, x: Tokens, chunk: Chunk, name: str) -> Tokens:
        """(tokens, heads * padded dim) float16 behind their norm and RoPE, `what` of q, k and v."""
        source = "k" if what == "v" and self._config.key_is_value(self.number) else what
        role = f"self_attn.{source}_proj"
        y = self.linear(role, x, "heads")
        dim, heads = self._dim, self._linears[role].half.rows // self._dim
        half = self._store.matrix(
            name, chunk.tokens, heads * padded(dim), "f16", spare=padded(chunk.length)
        )
        gain = self._head_gain(what)
        if gain is not None:
            largest = math.sqrt(dim) * float(np.abs(gain).max())
        else:
            norms = self._linears[role].norms
            largest = self._largest_input("input_layernorm") * float(norms.max())
        factor = power_below(TOP, MARGIN * largest)
        gains = y.span if gain is None else self._store.vector(f"{self.name} {what} gain", gain)
        push = addresses(half.span, y.span, gains, self._turns(chunk.length))
        push += words(y.stride, heads, chunk.length)
        push += struct.pack("<2f", self._config.rms_norm_eps, factor)
        constants = {"LANES": LANES, "DIM": dim, "DIM_OUT": padded(dim)}
        switches = {"NORM": gain is not None, "ROPE": what != "v"}
        grid = (chunk.tokens, heads, 1)
        self._stream.dispatch("dense_heads", push, grid, {**constants, **switches})
        return Tokens(half, factor)

    def _head_gain(self, what: str) -> Array | None:
        """(dim,) of the norm of a head; None where it has none."""
        if what == "v":
            return np.ones(self._dim, np.float32) if self._config.value_norm else None
        return self._gains[f"self_attn.{what}_norm"] if self._config.qk_norm else None

    def _turns(self, length: int) -> Span:
        """cos and sin of each position and pair, for this layer's angle."""
        config, number = self._config, self.number
        name = f"turns {config.theta(number)} {config.position_scale(number)}"
        name += f" {config.rotary_pairs(number)} of {self._dim}"
        tables = np.stack(rope_tables(config, number, 0, length), axis=-1)
        return self._store.constant(name, tables.reshape(-1))

    def _softmax(self, scores: Matrix, weights: Matrix, length: int, factor: float) -> None:
        config = self._config
        push = addresses(scores.span, weights.span) + words(scores.stride, length)
        push += struct.pack("<f", config.attention_scale * factor)
        constants: dict[str, int | float] = {
            "LANES": LANES,
            "WINDOW": config.window(self.number) or 0,
            "CAP": float(config.attn_softcap or 0.0),
        }
        grid = (scores.stride, scores.height // scores.stride, 1)
        self._stream.dispatch("dense_softmax", push, grid, constants)

    def mlp_hidden(self, x: Tokens, name: str) -> Tokens:
        """Input of down_proj, in the store's matrix `name`."""
        gate, up = (self.linear(f"mlp.{part}_proj", x, part) for part in ("gate", "up"))
        norms = [self._linears[f"mlp.{part}_proj"].norms for part in ("gate", "up")]
        largest = self._largest_input(self._mlp_norm) ** 2 * float((norms[0] * norms[1]).max())
        factor = power_below(TOP, MARGIN * largest)
        half = self._store.matrix(name, gate.rows, gate.cols, "f16")
        self._cells.run(Cell.GEGLU, half, gate, other=up, alpha=factor)
        return Tokens(half, factor)

    def join(self, chunk: Chunk, out: Matrix, norm: str) -> None:
        """Add the output of o_proj or down_proj to the residual stream."""
        gain = self._gain_spans[norm] if self._config.post_norms else None
        hidden = chunk.hidden
        eps = self._config.rms_norm_eps
        self._cells.rows(Row.JOIN, hidden.span, hidden.stride, out, gain=gain, eps=eps)

    def leave(self, chunk: Chunk, weights: Mapping[str, Array]) -> None:
        """What a layer does last with the residual stream.

        Per-layer embeddings are the host's, which holds their tables: few products, all of a narrow
        matrix.

        Args:
            weights: of the layer that are never quantized.
        """
        config, hidden = self._config, chunk.hidden
        if config.per_layer:
            shape = chunk.sequences, chunk.length, config.hidden_size
            found = self._store.get(hidden).reshape(shape)
            found = reference.leave(config, self.number, weights, found, chunk.beside)
            self._store.fill(hidden, found.reshape(chunk.tokens, -1))
        elif config.layer_scalar:
            scalar = float(weights["layer_scalar"][0])
            self._cells.run(Cell.COPY, hidden, hidden, alpha=scalar)


def row_norms(cells: Cells, store: Store, weight: Matrix) -> tuple[Array, float]:
    """(rows,) Euclidean norms, and the largest magnitude of all."""
    extents = store.matrix("extents", weight.height, 2)
    cells.rows(Row.EXTENT, extents.span, 2, weight)
    found = store.numbers(extents.span, 2 * weight.rows).reshape(-1, 2)
    return np.sqrt(found[:, 0]), float(found[:, 1].max())


def power_below(top: float, largest: float) -> float:
    """The power of two that brings `largest` to at most `top`; 1 for 0."""
    if not 0 < largest < math.inf:
        return 1.0
    return 2.0 ** max(-60, min(60, math.floor(math.log2(top / largest))))
