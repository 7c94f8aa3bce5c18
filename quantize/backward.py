"""The gradient of a Gemma layer in float32, written out: from behind the layer to in front of it.

The forward pass is computed again on the way, by the stages of the reference, so a caller keeps
nothing of a layer but the residual stream in front of it. Shapes as in `kernels/reference.py`.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from uq.formats.config import GemmaConfig
from uq.kernels.attention import QUERY_BLOCK, rope_tables
from uq.kernels.elementwise import FAST, exp32, kernel, masked_softmax, rotate
from uq.kernels.products import flat, linear, rms_norm
from uq.kernels.reference import attention_context, attention_input, mlp_input
from uq.kernels.weights import Weights

Array = NDArray[np.float32]
# Role of a linear, its output and the gradient there, (tokens, rows) each.
Visit = Callable[[str, Array, Array], None]

_ZERO, _ONE, _THREE = np.float32(0.0), np.float32(1.0), np.float32(3.0)
_GELU_SCALE = np.float32(2.0 * np.sqrt(2.0 / np.pi))
_GELU_CUBE = np.float32(0.044715)
_GELU_LOW = np.float32(-34.0)  # as in `gelu_product`


def layer_backward(
    config: GemmaConfig, layer: int, weights: Weights, hidden: Array, slope: Array, visit: Visit
) -> Array:
    """Gradient in front of a layer, (batch, length, hidden), of models without extensions.

    Args:
        hidden: the residual stream in front of the layer.
        slope: the gradient behind it.
        visit: is called once for every linear of the layer.
    """
    x = attention_input(config, weights, hidden)
    context = attention_context(config, layer, weights, x)
    out = linear(context, weights["self_attn.o_proj"])
    middle = hidden + _post_norm(config, weights, "post_attention_layernorm", out)
    slope = slope + _mlp_backward(config, weights, middle, slope, visit)
    at_out = _post_norm_backward(config, weights, "post_attention_layernorm", out, slope)
    visit("self_attn.o_proj", flat(out), flat(at_out))
    at_context = _through(at_out, weights["self_attn.o_proj"])
    at_x = _attention_backward(config, layer, weights, x, at_context, visit)
    gain = weights["input_layernorm"]
    return slope + rms_norm_backward(hidden, gain, config.rms_norm_eps, at_x)


def _mlp_backward(
    config: GemmaConfig, weights: Weights, hidden: Array, slope: Array, visit: Visit
) -> Array:
    """What the MLP adds to the gradient in front of it."""
    x = mlp_input(config, weights, hidden)
    gate, up = (linear(x, weights[f"mlp.{name}_proj"]) for name in ("gate", "up"))
    product, by_gate = np.empty_like(gate), np.empty_like(gate)
    gelu_slopes(flat(gate), flat(up), flat(product), flat(by_gate))
    out = linear(product * up, weights["mlp.down_proj"])
    at_out = _post_norm_backward(config, weights, "post_feedforward_layernorm", out, slope)
    visit("mlp.down_proj", flat(out), flat(at_out))
    at_y = _through(at_out, weights["mlp.down_proj"])
    at_gate, at_up = at_y * by_gate, at_y * product
    visit("mlp.gate_proj", flat(gate), flat(at_gate))
    visit("mlp.up_proj", flat(up), flat(at_up))
    at_x = _through(at_gate, weights["mlp.gate_proj"]) + _through(at_up, weights["mlp.up_proj"])
    name = "pre_feedforward_layernorm" if config.post_norms else "post_attention_layernorm"
    return rms_norm_backward(hidden, weights[name], config.rms_norm_eps, at_x)


def _attention_backward(
    config: GemmaConfig, layer: int, weights: Weights, x: Array, slope: Array, visit: Visit
) -> Array:
    """Gradient at the input of q_proj, k_proj and v_proj from that at their context."""
    raw = {name: linear(x, weights[f"self_attn.{name}_proj"]) for name in "qkv"}
    heads = {name: y.reshape(*y.shape[:2], -1, config.head_dim) for name, y in raw.items()}
    cos, sin = rope_tables(config, layer, 0, x.shape[1])
    turned = {name: heads[name].copy() for name in "qk"}
    for name, y in turned.items():
        if config.qk_norm:
            gain = weights[f"self_attn.{name}_norm"]
            turned[name] = y = rms_norm(y, gain, config.rms_norm_eps)
        rotate(y, cos, sin)
    slope = slope.reshape(heads["q"].shape)
    found = attend_backward(config, layer, turned["q"], turned["k"], heads["v"], slope)
    slopes = dict(zip("qkv", found, strict=True))
    for name in "qk":
        rotate(slopes[name], cos, -sin)  # the inverse of a turn is its transpose
        if config.qk_norm:
            gain = weights[f"self_attn.{name}_norm"]
            slopes[name] = rms_norm_backward(heads[name], gain, config.rms_norm_eps, slopes[name])
    total = np.zeros_like(x)
    for name, at in slopes.items():
        at = at.reshape(raw[name].shape)
        visit(f"self_attn.{name}_proj", flat(raw[name]), flat(at))
        total += _through(at, weights[f"self_attn.{name}_proj"])
    return total


def attend_backward(
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


def _post_norm(config: GemmaConfig, weights: Weights, name: str, out: Array) -> Array:
    return rms_norm(out, weights[name], config.rms_norm_eps) if config.post_norms else out


def _post_norm_backward(
    config: GemmaConfig, weights: Weights, name: str, out: Array, slope: Array
) -> Array:
    """Gradient at an output from that where it joins the residual stream."""
    if not config.post_norms:
        return slope
    return rms_norm_backward(out, weights[name], config.rms_norm_eps, slope)


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
