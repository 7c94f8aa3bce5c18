"""Parts of a layer in float32, each with its pullback: what makes of the gradient behind the part
that in front of it.

A pullback may be called once; it holds what the part computed.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from uq.formats.config import GemmaConfig
from uq.kernels.attention import QUERY_BLOCK
from uq.kernels.elementwise import FAST, exp32, kernel, masked_softmax
from uq.kernels.laurel import keep_largest
from uq.kernels.products import flat, linear, rms_norm

Array = NDArray[np.float32]
Pullback = Callable[[Array], Array]

_ZERO, _ONE, _THREE = np.float32(0.0), np.float32(1.0), np.float32(3.0)
_GELU_SCALE = np.float32(2.0 * np.sqrt(2.0 / np.pi))
_GELU_CUBE = np.float32(0.044715)
_GELU_LOW = np.float32(-34.0)  # as in `gelu_product`


def norm(x: Array, gain: Array, eps: float) -> tuple[Array, Pullback]:
    """`rms_norm`."""
    return rms_norm(x, gain, eps), lambda slope: rms_norm_backward(x, gain, eps, slope)


def product(x: Array, weight: Array) -> tuple[Array, Pullback]:
    """`linear`."""
    return linear(x, weight), lambda slope: _through(slope, weight)


def gelu_gated(gate: Array, up: Array) -> tuple[Array, Callable[[Array], tuple[Array, Array]]]:
    """gelu(gate) * up; the gradients at the gate and at `up`."""
    activated, by_gate = np.empty_like(gate), np.empty_like(gate)
    gelu_slopes(flat(gate), flat(up), flat(activated), flat(by_gate))
    return activated * up, lambda slope: (slope * by_gate, slope * activated)


def sparse(gate: Array, sparsity: float) -> tuple[Array, Pullback]:
    """`keep_largest`, whose threshold moves with the mean and the deviation of the channels."""
    if not sparsity:
        return gate, lambda slope: slope
    kept = gate.copy()
    keep_largest(kept, sparsity)
    quantile = NormalDist().inv_cdf(sparsity)

    def pull(slope: Array) -> Array:
        passed = np.where(kept > 0, slope, np.float32(0))
        centred = gate - gate.mean(axis=-1, keepdims=True)
        deviation = np.maximum(gate.std(axis=-1, keepdims=True), np.float32(1e-30))
        moved = 1 + np.float32(quantile) * centred / deviation  # what the threshold is moved by
        found: Array = passed - passed.mean(axis=-1, keepdims=True) * moved
        return found

    return kept, pull


def attention_slopes(
    config: GemmaConfig, layer: int, q: Array, k: Array, v: Array, slope: Array
) -> tuple[Array, Array, Array]:
    """Gradients at q, k and v of causal attention, whose weights are computed again.

    Args:
        q: (batch, length, heads, dim), like `slope`, the gradient at the context.
        k, v: (batch, length, kv_heads, dim).
    """
    batch, length, heads, dim = q.shape
    kv_heads = k.shape[2]
    group, window = heads // kv_heads, config.window(layer) or length
    grouped = (batch, length, kv_heads, group, dim)
    q, slope = q.reshape(grouped), slope.reshape(grouped)
    at_q, at_k, at_v = np.empty_like(q), np.zeros_like(k), np.zeros_like(v)
    for first in range(0, length, QUERY_BLOCK):
        last = min(first + QUERY_BLOCK, length)
        seen = slice(max(0, first - window + 1), last)  # keys
        for b, head in np.ndindex(batch, kv_heads):
            queries, back = (a[b, first:last, head].reshape(-1, dim) for a in (q, slope))
            keys, values = k[b, seen, head], v[b, seen, head]
            raw = queries @ keys.T  # (queries * group, keys seen)
            weights, offset = raw.copy(), first - seen.start
            cap = config.attn_softcap or 0.0
            masked_softmax(weights, group, offset, window, config.attention_scale, cap)
            at_v[b, seen, head] += weights.T @ back
            at_raw = _softmax_backward(config, raw, weights, back @ values.T)
            at_q[b, first:last, head] = (at_raw @ keys).reshape(-1, group, dim)
            at_k[b, seen, head] += at_raw.T @ queries
    return at_q.reshape(batch, length, heads, dim), at_k, at_v


def _softmax_backward(config: GemmaConfig, raw: Array, weights: Array, slope: Array) -> Array:
    """Gradient at the raw products; all (rows, keys)."""
    inner = np.einsum("rk,rk->r", slope, weights)[:, None]
    at_raw: Array = (slope - inner) * weights * np.float32(config.attention_scale)
    if cap := config.attn_softcap:
        at_raw *= 1 - np.tanh(raw * np.float32(config.attention_scale / cap)) ** 2
    return at_raw


def rms_norm_backward(x: Array, gain: Array, eps: float, slope: Array) -> Array:
    """Gradient at x (..., n) from that at `rms_norm(x, gain, eps)`."""
    factor = 1 / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + np.float32(eps))
    scaled = slope * gain
    along = np.mean(scaled * x, axis=-1, keepdims=True) * factor**2
    found: Array = (scaled - x * along) * factor
    return found


def _through(slope: Array, weight: Array) -> Array:
    """Gradient at the input of a linear from that at its output."""
    return (flat(slope) @ weight).reshape(*slope.shape[:-1], weight.shape[1])


@kernel(fastmath=FAST)
def gelu_slopes(gate: Array, up: Array, product: Array, by_gate: Array) -> None:
    """gelu(gate), and what gelu(gate) * up changes by with gate; all (rows, n).

    With s = 1 / (1 + exp(-2 v)) as in `gelu_product`: gelu' = s + x s (1 - s) 2 v'.
    """
    rows, n = gate.shape
    for row in range(rows):
        for i in range(n):
            x = gate[row, i]
            twice = _GELU_SCALE * (x + _GELU_CUBE * x * x * x)
            s = _ZERO if twice < _GELU_LOW else _ONE / (_ONE + exp32(-twice))
            steep = _GELU_SCALE * (_ONE + _THREE * _GELU_CUBE * x * x)
            product[row, i] = x * s
            by_gate[row, i] = (s + x * s * (_ONE - s) * steep) * up[row, i]
