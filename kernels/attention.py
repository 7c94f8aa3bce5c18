"""Attention in float32: RoPE tables, the KV cache, and softmax(Q K^T) V in blocks of queries."""

from __future__ import annotations

from functools import cached_property

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
    keys, kv_heads = k.shape[1:3]
    past, group = keys - length, heads // kv_heads
    window = config.window(layer) or keys
    cap = config.attn_softcap or 0.0
    q = q.reshape(batch, length, kv_heads, group, dim)
    out = np.empty_like(q)
    for first in range(0, length, QUERY_BLOCK):
        last = min(first + QUERY_BLOCK, length)
        low, high = max(0, past + first - window + 1), past + last  # keys that the block sees
        for b, head in np.ndindex(batch, kv_heads):
            block = q[b, first:last, head].reshape(-1, dim)  # (queries * group, dim)
            weights = block @ k[b, low:high, head].T  # (queries * group, keys seen)
            masked_softmax(weights, group, past + first - low, window, config.attention_scale, cap)
            mixed = weights @ v[b, low:high, head]
            out[b, first:last, head] = mixed.reshape(-1, group, dim)
    return out.reshape(batch, length, heads * dim)


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
