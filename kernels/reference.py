"""The exact forward pass of Gemma in float32, staged so that a caller can work between stages.

A layer is eight functions, one after the other, cut where the inputs of its linears appear.
`ReferenceSession` runs them over a checkpoint, one layer in memory at a time.
Shapes: hidden (batch, length, hidden); weights by role, linears (out, in), norms as gains.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np
import psutil
from numpy.typing import NDArray

from uq.errors import UsageError
from uq.formats.config import AltUp, GemmaConfig
from uq.kernels.altup import active, correct, gather, predict, spread
from uq.kernels.attention import KVCache, attend, rope_tables
from uq.kernels.elementwise import gelu_product, rotate
from uq.kernels.experts import experts_output
from uq.kernels.kv_format import KVFormat
from uq.kernels.laurel import add_laurel, keep_largest
from uq.kernels.numerics import FLOAT, Numerics
from uq.kernels.per_layer import Beside, per_layer_output, stored_tokens
from uq.kernels.products import flat, linear, rms_norm
from uq.kernels.sampling import sample
from uq.kernels.session import Device, Sampling, check_room, check_tokens
from uq.kernels.weights import (
    CheckpointWeights,
    Weights,
    WeightSource,
    active_parameters,
    resident_parameters,
)

Array = NDArray[np.float32]

TOKEN_BLOCK = 4096  # tokens whose activations of one layer are in memory at once
VOCAB_BLOCK = 8192  # rows of the head that are in memory at once while decoding


def embed(config: GemmaConfig, rows: Array) -> Array:
    """Hidden states in front of layer 0 from embedding rows (..., hidden)."""
    return rows * np.float32(config.embed_scale)


def enter(config: GemmaConfig, weights: Weights, hidden: Array, beside: Beside) -> Array:
    """The residual stream as the layer finds it; of several the active one."""
    if config.altup is None:
        return hidden
    assert beside.streams is not None
    beside.streams = predict(config, config.altup, weights, beside.streams)
    return active(config.altup, beside.streams)


def attention_input(config: GemmaConfig, weights: Weights, hidden: Array) -> Array:
    """Input of q_proj, k_proj and v_proj: (batch, length, hidden)."""
    return rms_norm(hidden, weights["input_layernorm"], config.rms_norm_eps)


def attention_context(
    config: GemmaConfig,
    layer: int,
    weights: Weights,
    x: Array,
    cache: KVCache | None = None,
    kv: KVFormat | None = None,
    beside: Beside | None = None,
) -> Array:
    """Input of o_proj: softmax(Q K^T) V of every head, (batch, length, q_size).

    With a cache (batch 1), its keys and values come first and those of `x` are added to it. `kv` is
    how they are stored; the cache itself keeps them in float32.
    """
    shared = {} if beside is None else beside.shared
    start = 0 if cache is None else cache.position
    q = _heads(config, layer, linear(x, weights["self_attn.q_proj"]))
    if config.qk_norm:
        q = rms_norm(q, weights["self_attn.q_norm"], config.rms_norm_eps)
    rotate(q, *rope_tables(config, layer, start, x.shape[1]))
    source = config.kv_source(layer)
    if source == layer:
        k, v = _keys_and_values(config, layer, weights, x, start)
        if cache is not None:
            k, v = cache.append(layer, k, v)
        if kv is not None:
            k, v = kv.keys(config, layer, weights, k), kv.values(v)
        if layer in config.shared_sources:
            shared[layer] = k, v
    return attend(config, layer, q, *(shared[source] if source != layer else (k, v)))


def _keys_and_values(
    config: GemmaConfig, layer: int, weights: Weights, x: Array, start: int
) -> tuple[Array, Array]:
    """Of the tokens of `x`, normed and turned as attention reads them: (batch, length, heads, dim)
    each.
    """
    raw = linear(x, weights["self_attn.k_proj"])
    v = raw if config.key_is_value(layer) else linear(x, weights["self_attn.v_proj"])
    k, v = _heads(config, layer, raw), _heads(config, layer, v)
    if config.value_norm:  # in front of the keys' norm and rotation, where they are one array
        v = rms_norm(v, np.ones(v.shape[-1], np.float32), config.rms_norm_eps)
    if config.qk_norm:
        k = rms_norm(k, weights["self_attn.k_norm"], config.rms_norm_eps)
    rotate(k, *rope_tables(config, layer, start, x.shape[1]))
    return k, v


def _heads(config: GemmaConfig, layer: int, y: Array) -> Array:
    """(batch, length, heads * dim) -> (batch, length, heads, dim)."""
    return y.reshape(*y.shape[:2], -1, config.layer_head_dim(layer))


def add_attention(
    config: GemmaConfig, weights: Weights, hidden: Array, context: Array, out: Array | None = None
) -> Array:
    """The residual stream behind attention; `out` of o_proj is taken over, where it is known."""
    if out is None:
        out = linear(context, weights["self_attn.o_proj"])
    if config.post_norms:
        out = rms_norm(out, weights["post_attention_layernorm"], config.rms_norm_eps)
    out += hidden
    if config.laurel_rank:
        out = add_laurel(config, weights, out, attention_input(config, weights, hidden))
    return out


def mlp_input(config: GemmaConfig, weights: Weights, hidden: Array) -> Array:
    """Input of gate_proj and up_proj: (batch, length, hidden)."""
    # gemma calls the norm in front of the MLP by what it stands behind.
    name = "pre_feedforward_layernorm" if config.post_norms else "post_attention_layernorm"
    return rms_norm(hidden, weights[name], config.rms_norm_eps)


def mlp_hidden(config: GemmaConfig, layer: int, weights: Weights, x: Array) -> Array:
    """Input of down_proj: gelu(gate) * up, (batch, length, intermediate)."""
    gate = linear(x, weights["mlp.gate_proj"])
    up = linear(x, weights["mlp.up_proj"])
    if sparsity := config.sparsity(layer):
        keep_largest(gate, sparsity)
    gelu_product(flat(gate), flat(up))
    return gate


def add_mlp(
    config: GemmaConfig,
    weights: Weights,
    hidden: Array,
    y: Array,
    out: Array | None = None,
    experts: Array | None = None,
    numerics: Numerics = FLOAT,
) -> Array:
    """The residual stream behind the MLP and its experts.

    `out` of down_proj and `experts_output` are taken over, where they are known; `numerics` are
    of experts that are not.
    """
    if out is None:
        out = linear(y, weights["mlp.down_proj"])
    if config.experts:
        out = rms_norm(out, weights["post_feedforward_layernorm_1"], config.rms_norm_eps)
        out += experts_output(config, weights, hidden, numerics) if experts is None else experts
    if config.post_norms:
        out = rms_norm(out, weights["post_feedforward_layernorm"], config.rms_norm_eps)
    out += hidden
    return out


def leave(
    config: GemmaConfig, layer: int, weights: Weights, hidden: Array, beside: Beside
) -> Array:
    """The residual stream behind what a layer does last."""
    if config.altup:
        return _leave_streams(config, config.altup, layer, weights, hidden, beside)
    if config.per_layer:
        hidden = hidden + per_layer_output(config, layer, weights, hidden, beside)
    if config.layer_scalar:
        hidden = hidden * weights["layer_scalar"]
    return hidden


def _leave_streams(
    config: GemmaConfig, altup: AltUp, layer: int, weights: Weights, hidden: Array, beside: Beside
) -> Array:
    """The active stream behind a layer; the per-layer embedding goes to all but the first."""
    assert beside.streams is not None
    beside.streams = correct(config, altup, weights, beside.streams, hidden)
    x = active(altup, beside.streams)
    if altup.scaled:
        x *= weights["altup.correct_output_scale"]
    more = per_layer_output(config, layer, weights, x, beside)
    beside.streams[..., 1:, :] += more[..., None, :]
    return active(altup, beside.streams)


def layer_forward(
    config: GemmaConfig,
    layer: int,
    weights: Weights,
    hidden: Array,
    cache: KVCache | None = None,
    numerics: Numerics = FLOAT,
    beside: Beside | None = None,
) -> Array:
    """One decoder layer: the eight stages above.

    Args:
        beside: of these sequences; the same object for every layer.
    """
    beside = Beside() if beside is None else beside
    hidden = enter(config, weights, hidden, beside)
    x = numerics.linear_input(attention_input(config, weights, hidden))
    context = attention_context(config, layer, weights, x, cache, numerics.kv, beside)
    hidden = add_attention(config, weights, hidden, numerics.linear_input(context))
    x = numerics.linear_input(mlp_input(config, weights, hidden))
    y = numerics.linear_input(mlp_hidden(config, layer, weights, x))
    hidden = add_mlp(config, weights, hidden, y, numerics=numerics)
    return leave(config, layer, weights, hidden, beside)


def soft_cap(config: GemmaConfig, logits: Array) -> Array:
    """cap * tanh(logits / cap) in models that have it, in place."""
    if cap := config.final_softcap:
        np.tanh(logits / np.float32(cap), out=logits)
        logits *= np.float32(cap)
    return logits


class ReferenceSession:
    """Runs a checkpoint in float32: the measure of every other session.

    `score` reads each layer once per call, whatever the batch; a model whose float32 weights fit
    in a third of the free memory stays there, so that its decode speed is a fair one.
    With other `numerics` than float32 it computes what a device would, slower than float32.
    """

    def __init__(
        self,
        checkpoint: WeightSource,
        *,
        max_context: int = 4096,
        resident: bool | None = None,
        numerics: Numerics = FLOAT,
    ) -> None:
        """
        Raises:
            UsageError: the numerics do not fit the model's shapes.
        """
        self.config = checkpoint.config
        numerics.check(self.config)
        self._numerics = numerics
        if resident is None:
            free = psutil.virtual_memory().available
            resident = 4 * resident_parameters(self.config) <= free // 3
        features = ("resident" if resident else "streamed",)
        self.device = Device("reference", "float32, numpy", f"numpy {np.__version__}", features)
        self.max_context = max_context
        self._weights = CheckpointWeights(checkpoint, resident=resident)
        self._cache = KVCache(self.config, max_context)
        self._logits: Array | None = None

    @property
    def probe(self) -> None:
        return None

    @property
    def bytes_per_token(self) -> int:
        """Float32 bytes of all layers, the norms, the head and one embedding row."""
        config = self.config
        unread = 0 if config.tied_head else config.vocab_size * config.hidden_size
        return 4 * (active_parameters(config) - unread + config.hidden_size)

    @property
    def position(self) -> int:
        return self._cache.position

    def score(self, tokens: NDArray[np.int32]) -> Array:
        check_tokens(tokens, self.config.vocab_size)
        hidden = embed(self.config, self._weights.embedding(tokens))
        step = max(1, TOKEN_BLOCK // tokens.shape[1])
        blocks = [slice(first, first + step) for first in range(0, len(tokens), step)]
        beside = [self._beside(tokens[block], hidden[block]) for block in blocks]
        for layer in range(self.config.num_layers):
            weights = self._weights.layer(layer)
            for block, more in zip(blocks, beside, strict=True):
                hidden[block] = self._layer(layer, weights, hidden[block], None, more)
        for block, more in zip(blocks, beside, strict=True):
            hidden[block] = finish(self.config, self._weights, hidden[block], more)
        return rms_norm(hidden, self._weights.final_norm, self.config.rms_norm_eps)

    def logits(self, hidden: Array, start: int, stop: int) -> Array:
        x = self._numerics.head_input(hidden)
        return soft_cap(self.config, linear(x, self._weights.head(start, stop)))

    def reset(self) -> None:
        self._cache.position = 0
        self._logits = None

    def prefill(self, tokens: Sequence[int]) -> None:
        ids = np.asarray(tokens, np.int32).reshape(1, -1)
        check_tokens(ids, self.config.vocab_size)
        check_room(ids.size, self.position, self.max_context)
        hidden = embed(self.config, self._weights.embedding(ids))
        beside = self._beside(ids, hidden)
        for layer in range(self.config.num_layers):
            weights = self._weights.layer(layer)
            hidden = self._layer(layer, weights, hidden, self._cache, beside)
        self._cache.position += ids.size
        last = finish(self.config, self._weights, hidden, beside)[:, -1]
        last = rms_norm(last, self._weights.final_norm, self.config.rms_norm_eps)
        self._logits = self._all_logits(last)

    def decode(self, count: int, sampling: Sampling) -> Iterator[int]:
        for _ in range(count):
            if self._logits is None:
                raise UsageError("decode needs at least one token before it; call prefill first")
            if self.position == self.max_context:
                return
            token = sample(self._logits, sampling, self.position)
            self.prefill([token])
            yield token

    def _layer(
        self, layer: int, weights: Weights, hidden: Array, cache: KVCache | None, beside: Beside
    ) -> Array:
        return layer_forward(self.config, layer, weights, hidden, cache, self._numerics, beside)

    def _beside(self, tokens: NDArray[np.int32], embedded: Array) -> Beside:
        """Of sequences in front of layer 0."""
        if self.config.per_layer is None:
            return Beside()
        table, altup = self.config.per_layer, self.config.altup
        rows = self._weights.per_layer_rows(stored_tokens(table, tokens))
        streams = None if altup is None else spread(altup, self._weights.whole, embedded)
        return Beside(embedded.copy(), partial(_columns, rows, table.size), streams)

    def _all_logits(self, hidden: Array) -> Array:
        """(vocab,) of one hidden state (1, hidden)."""
        vocab = self.config.vocab_size
        starts = range(0, vocab, VOCAB_BLOCK)
        blocks = [self.logits(hidden, i, min(i + VOCAB_BLOCK, vocab))[0] for i in starts]
        return np.concatenate(blocks)


def _columns(rows: Array, size: int, layer: int) -> Array:
    """A layer's part of rows (..., layers * size)."""
    return rows[..., layer * size : (layer + 1) * size]


def finish(config: GemmaConfig, weights: CheckpointWeights, hidden: Array, beside: Beside) -> Array:
    """What the final norm takes: the residual stream, or what all streams are brought into."""
    if config.altup is None:
        return hidden
    assert beside.streams is not None
    return gather(config.altup, weights.whole, beside.streams)
