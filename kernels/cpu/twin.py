"""The slow twin of the CPU kernels: dequantize, then the textbook formulas in float64.

Nothing is shared with the kernels: no layout, no activation scales, no cache, no blocks of tokens.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from uq.formats.config import EMBEDDING, FINAL_NORM, HEAD, GemmaConfig, layer_tensor
from uq.formats.spec import QuantTensor

Array = NDArray[np.float64]
Weights = Mapping[str, Array]


def dequantized(
    tensors: Mapping[str, QuantTensor], gains: Mapping[str, NDArray[np.float32]]
) -> dict[str, Array]:
    """Every weight in float64 under its canonical name; gains under the name of their norm."""
    weights = {name: tensor.dequantize().astype(np.float64) for name, tensor in tensors.items()}
    return weights | {name: gain.astype(np.float64) for name, gain in gains.items()}


def hidden_states(config: GemmaConfig, weights: Weights, tokens: NDArray[np.int32]) -> Array:
    """(length, hidden) behind the final norm, of one sequence (length,) from position 0."""
    h = weights[EMBEDDING][tokens] * config.embed_scale
    for layer in range(config.num_layers):
        w = {role: weights[layer_tensor(layer, role)] for role in _roles(config)}
        branch = _attention(config, layer, w, _norm(config, h, w["input_layernorm"]))
        if config.post_norms:
            branch = _norm(config, branch, w["post_attention_layernorm"])
        h = h + branch
        before = "pre_feedforward_layernorm" if config.post_norms else "post_attention_layernorm"
        branch = _mlp(w, _norm(config, h, w[before]))
        if config.post_norms:
            branch = _norm(config, branch, w["post_feedforward_layernorm"])
        h = h + branch
    return _norm(config, h, weights[FINAL_NORM])


def logits(config: GemmaConfig, weights: Weights, hidden: Array) -> Array:
    """(n, vocab) of hidden states (n, hidden)."""
    head = weights[EMBEDDING if config.tied_head else HEAD]
    return _cap(hidden @ head.T, config.final_softcap)


def _roles(config: GemmaConfig) -> list[str]:
    return [*config.linear_shapes(0), *config.norm_shapes(0)]


def _norm(config: GemmaConfig, x: Array, gain: Array) -> Array:
    scaled: Array = x / np.sqrt((x * x).mean(-1, keepdims=True) + config.rms_norm_eps) * gain
    return scaled


def _cap(x: Array, cap: float | None) -> Array:
    return x if cap is None else cap * np.tanh(x / cap)


def _mlp(w: Weights, x: Array) -> Array:
    gate = x @ w["mlp.gate_proj"].T
    inner = np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)
    gelu = 0.5 * gate * (1 + np.tanh(inner))
    down: Array = (gelu * (x @ w["mlp.up_proj"].T)) @ w["mlp.down_proj"].T
    return down


def _attention(config: GemmaConfig, layer: int, w: Weights, x: Array) -> Array:
    length, group = len(x), config.num_heads // config.num_kv_heads
    q, k, v = (_heads(config, x @ w[f"self_attn.{name}_proj"].T) for name in "qkv")
    if config.qk_norm:
        q = _norm(config, q, w["self_attn.q_norm"])
        k = _norm(config, k, w["self_attn.k_norm"])
    q, k = _rope(config, layer, q), _rope(config, layer, k)
    k, v = k.repeat(group, axis=0), v.repeat(group, axis=0)
    scores = _cap(q @ k.transpose(0, 2, 1) * config.attention_scale, config.attn_softcap)
    behind = np.arange(length)[:, None] - np.arange(length)  # own position - key position
    visible = (behind >= 0) & (behind < (config.window(layer) or length))
    scores = np.where(visible, scores, -np.inf)  # (heads, length, length)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    context = (weights @ v).transpose(1, 0, 2).reshape(length, -1)
    out: Array = context @ w["self_attn.o_proj"].T
    return out


def _heads(config: GemmaConfig, x: Array) -> Array:
    """(length, heads * dim) -> (heads, length, dim)."""
    return x.reshape(len(x), -1, config.head_dim).transpose(1, 0, 2)


def _rope(config: GemmaConfig, layer: int, x: Array) -> Array:
    half = config.head_dim // 2
    frequency = config.theta(layer) ** (-np.arange(half) / half)
    position = np.arange(x.shape[1]) * config.position_scale(layer)
    angle = np.outer(position, frequency)  # (length, dim / 2)
    low, high = x[..., :half], x[..., half:]
    turned = [
        low * np.cos(angle) - high * np.sin(angle),
        high * np.cos(angle) + low * np.sin(angle),
    ]
    return np.concatenate(turned, axis=-1)
