"""Attention in float32: RoPE tables, the KV cache, and softmax(Q K^T) V in blocks of queries."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from uq.formats.config import GemmaConfig
from uq.kernels.elementwise import masked_softmax

Array = NDArray[np.float32]

QUERY_BLOCK = 128  # queries whose attention scores are in memory at once


def rope_tables(config: GemmaConfig, layer: int, start: int, length: int) -> tuple[Array, Array]:
    """cos and sin of position * theta^(-2 i / dim), each (length, dim / 2) (Su et al., RoFormer).

    Angles are float64: in float32 they lose a radian's fourth digit at a few thousand tokens.
    """
    half = config.layer_head_dim(layer) // 2
    frequency = config.theta(layer) ** (-np.arange(half) / half)
    frequency[config.rotary_pairs(layer) :] = 0  # these stay as they are
    position = np.arange(start, start + length) * config.position_scale(layer)
    angle = np.outer(position, frequency)
    return np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)


def attend(config: GemmaConfig, layer: int, q: Array, k: Array, v: Array) -> Array:
    """Causal attention of the last positions over all of them, (batch, length, q_size).

    Args:
        q: (batch, length, heads, dim), the last `length` of the keys' positions.
        k, v: (batch, keys, kv_heads, dim).
    """
    batch, length, heads, dim = q.shape
    kv_heads = k.shape[2]
    out = np.empty((batch, length, kv_heads, heads // kv_heads, dim), np.float32)
    for share in attention_shares(config, layer, q, k):
        mixed = share.weights @ v[share.sequence, share.seen, share.head]
        part = out[share.sequence, share.queries, share.head]
        part[:] = mixed.reshape(part.shape)
    return out.reshape(batch, length, heads * dim)


class Share(NamedTuple):
    """What some queries of a key head take of each key that they see.

    Attributes:
        sequence, head: of the keys.
        queries, seen: positions of the queries and of the keys.
        weights: (queries * group, keys seen), the heads of a query side by side; rows sum to 1.
    """

    sequence: int
    head: int
    queries: slice
    seen: slice
    weights: Array


def attention_shares(config: GemmaConfig, layer: int, q: Array, k: Array) -> Iterator[Share]:
    """softmax(Q K^T) of all queries, a block at a time; q and k as `attend` takes them."""
    batch, length, heads, dim = q.shape
    keys, kv_heads = k.shape[1:3]
    past, group = keys - length, heads // kv_heads
    window = config.window(layer) or keys
    cap = config.attn_softcap or 0.0
    q = q.reshape(batch, length, kv_heads, group, dim)
    for first in range(0, length, QUERY_BLOCK):
        last = min(first + QUERY_BLOCK, length)
        low, high = max(0, past + first - window + 1), past + last  # keys that the block sees
        for b, head in np.ndindex(batch, kv_heads):
            block = q[b, first:last, head].reshape(-1, dim)  # (queries * group, dim)
            weights = block @ k[b, low:high, head].T
            masked_softmax(weights, group, past + first - low, window, config.attention_scale, cap)
            yield Share(b, head, slice(first, last), slice(low, high), weights)


class KVCache:
    """Keys (after RoPE) and values of one sequence, of every layer that has its own."""

    def __init__(self, config: GemmaConfig, capacity: int) -> None:
        self._shapes = {
            layer: (1, capacity, config.layer_kv_heads(layer), config.layer_head_dim(layer))
            for layer in range(config.num_layers)
            if config.kv_source(layer) == layer
        }
        self.position = 0

    # Made on first use: a session that only scores needs none.
    @cached_property
    def _keys(self) -> dict[int, Array]:
        return {layer: np.empty(shape, np.float32) for layer, shape in self._shapes.items()}

    @cached_property
    def _values(self) -> dict[int, Array]:
        return {layer: np.empty(shape, np.float32) for layer, shape in self._shapes.items()}

    def append(self, layer: int, k: Array, v: Array) -> tuple[Array, Array]:
        """Store k, v (1, length, kv_heads, dim) behind `position`; return those of all tokens."""
        stop = self.position + k.shape[1]
        keys, values = self._keys[layer], self._values[layer]
        keys[:, self.position : stop] = k
        values[:, self.position : stop] = v
        return keys[:, :stop], values[:, :stop]
