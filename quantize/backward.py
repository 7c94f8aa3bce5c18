"""The gradient of a Gemma layer in float32: from behind the layer to in front of it.

The forward pass is computed again on the way, so a caller keeps nothing of a layer but the residual
stream in front of it. Shapes as in `kernels/reference.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from uq.formats.config import (
    ALTUP,
    EXPERTS,
    FULL_HEADS,
    LAUREL,
    LAYER_SCALAR,
    MLP_WIDTHS,
    PER_LAYER,
    SHARED_KEYS,
    SPARSITY,
    VALUE_NORM,
    AltUp,
    GemmaConfig,
)
from uq.kernels.attention import attend, rope_tables
from uq.kernels.elementwise import rotate
from uq.kernels.per_layer import Beside, per_layer_input
from uq.kernels.products import flat
from uq.kernels.weights import Weights
from uq.quantize.pullbacks import (
    Pullback,
    attention_slopes,
    gelu_gated,
    norm,
    product,
    sparse,
)
from uq.quantize.stream_pullbacks import corrected, predicted

Array = NDArray[np.float32]
# Role of a linear, its output and the gradient there, (tokens, rows) each.
Visit = Callable[[str, Array, Array], None]
# What `GemmaConfig.extensions` names and is followed here.
FOLLOWED = frozenset(
    {FULL_HEADS, VALUE_NORM, SHARED_KEYS, MLP_WIDTHS, PER_LAYER, LAYER_SCALAR}
    | {EXPERTS, ALTUP, LAUREL, SPARSITY}
)


@dataclass
class Slope:
    """The gradient of some sequences on its way back through the layers.

    Attributes:
        stream: at the residual stream, (batch, length, hidden), or (batch, length, streams, hidden)
            in models with alternating updates.
        shared: layer -> at its keys and values, from the layers behind it.
        experts: at what the experts of the layer in work add to its MLP's output.
    """

    stream: Array
    shared: dict[int, tuple[Array, Array]] = field(default_factory=dict)
    experts: Array | None = None

    def take_experts(self) -> Array:
        """`experts`, once."""
        assert self.experts is not None
        found, self.experts = self.experts, None
        return found


@dataclass(frozen=True)
class LayerGradient:
    """Takes the gradient of some sequences from behind a layer to in front of it.

    Attributes:
        beside: as the forward pass left it.
        slope: behind the layer; in front of it when the work is done.
        visit: is called once for every linear of the layer that is no expert's.
    """

    config: GemmaConfig
    layer: int
    weights: Weights
    beside: Beside
    slope: Slope
    visit: Visit

    def back(self, stream: Array) -> None:
        """Of a layer without experts; `stream` is in front of it, shaped as the slope's."""
        if self.config.altup is not None:
            self.slope.stream = self._streams(self.config.altup, stream, self.slope.stream)
            return
        hidden, in_attention = self.attention(stream)
        self.slope.stream = in_attention(self.behind_attention(hidden))

    def behind_attention(self, hidden: Array) -> Array:
        """Gradient behind attention, without what experts add to it."""
        hidden, in_mlp = self._mlp(hidden)
        return in_mlp(self._end(hidden, self.slope.stream))

    def _streams(self, altup: AltUp, streams: Array, slope: Array) -> Array:
        """Gradient in front of the layer, of a model with several streams."""
        config = self.config
        streams, in_prediction = predicted(config, altup, self.weights, streams)
        hidden, in_attention = self.attention(streams[..., altup.active, :].copy())
        hidden, in_mlp = self._mlp(hidden)
        streams, in_correction = corrected(config, altup, self.weights, streams, hidden)
        x = streams[..., altup.active, :].copy()
        scale = self.weights["altup.correct_output_scale"] if altup.scaled else np.float32(1)
        in_more = self._per_layer(x * scale)
        slope = slope.copy()
        slope[..., altup.active, :] += in_more(slope[..., 1:, :].sum(axis=-2)) * scale
        slope, at_hidden = in_correction(slope)
        at_hidden = in_mlp(at_hidden)
        del in_mlp
        slope[..., altup.active, :] += in_attention(at_hidden)
        return in_prediction(slope)

    def attention(self, hidden: Array) -> tuple[Array, Pullback]:
        """The stream behind attention."""
        x, in_norm = self._norm(hidden, "input_layernorm")
        q, in_queries = self._heads(x, "q")
        source = self.config.kv_source(self.layer)
        k, v, in_keys = self._keys(x) if source == self.layer else self._keys_of(source)
        out, in_output = self._linear("self_attn.o_proj", attend(self.config, self.layer, q, k, v))
        out, in_post = self._post_norm(out, "post_attention_layernorm")
        out, in_laurel = self._laurel(hidden + out, x)

        def pull(slope: Array) -> Array:
            slope, at_x = in_laurel(slope)
            context = in_output(in_post(slope)).reshape(q.shape)
            at_q, at_k, at_v = attention_slopes(self.config, self.layer, q, k, v, context)
            at_x += in_queries(at_q)
            for part in in_keys(at_k, at_v):
                at_x += part
            return slope + in_norm(at_x)

        return out, pull

    def _heads(self, x: Array, name: str) -> tuple[Array, Pullback]:
        """Queries or keys as attention reads them."""
        raw, in_linear = self._linear(f"self_attn.{name}_proj", x)
        return self._turned(raw, name, in_linear)

    def _turned(self, raw: Array, name: str, in_linear: Pullback) -> tuple[Array, Pullback]:
        y, gain = self._by_head(raw), f"self_attn.{name}_norm"
        y, in_norm = self._norm(y, gain) if self.config.qk_norm else (y.copy(), _same)
        cos, sin = rope_tables(self.config, self.layer, 0, raw.shape[1])
        rotate(y, cos, sin)

        def pull(slope: Array) -> Array:
            rotate(slope, cos, -sin)  # the inverse of a turn is its transpose
            return in_linear(in_norm(slope).reshape(raw.shape))

        return y, pull

    def _keys(self, x: Array) -> tuple[Array, Array, Callable[[Array, Array], Iterator[Array]]]:
        """Keys and values of the layer's own."""
        raw, in_linear = self._linear("self_attn.k_proj", x)
        alone = not self.config.key_is_value(self.layer)
        k, in_keys = self._turned(raw, "k", in_linear if alone else _same)
        value, in_value = self._linear("self_attn.v_proj", x) if alone else (raw, _same)
        v, eps = self._by_head(value), self.config.rms_norm_eps
        ones = np.ones(v.shape[-1], np.float32)
        v, in_norm = norm(v, ones, eps) if self.config.value_norm else (v, _same)

        def pull(at_k: Array, at_v: Array) -> Iterator[Array]:
            at_k, at_v = self._with_later(self.layer, at_k, at_v)
            at_key, at_value = in_keys(at_k), in_value(in_norm(at_v).reshape(value.shape))
            return iter((at_key, at_value) if alone else (in_linear(at_key + at_value),))

        return k, v, pull

    def _keys_of(
        self, source: int
    ) -> tuple[Array, Array, Callable[[Array, Array], Iterator[Array]]]:
        """Those of an earlier layer, which takes the gradient up when its turn comes."""

        def pull(at_k: Array, at_v: Array) -> Iterator[Array]:
            self.slope.shared[source] = self._with_later(source, at_k, at_v)
            return iter(())

        return *self.beside.shared[source], pull

    def _with_later(self, source: int, at_k: Array, at_v: Array) -> tuple[Array, Array]:
        """The gradients at keys and values, with those of the layers behind that read them."""
        if source not in self.slope.shared:
            return at_k, at_v
        later_k, later_v = self.slope.shared.pop(source)
        return at_k + later_k, at_v + later_v

    def _laurel(
        self, hidden: Array, x: Array
    ) -> tuple[Array, Callable[[Array], tuple[Array, Array]]]:
        """`add_laurel` where the model has it; the gradients at `hidden` and at `x`."""
        if not self.config.laurel_rank:
            return hidden, lambda slope: (slope, np.zeros_like(x))
        half = np.float32(math.sqrt(0.5))
        low, in_left = product(x, self.weights["laurel.linear_left"])
        low, in_right = product(low, self.weights["laurel.linear_right"])
        low, in_norm = self._norm(low, "laurel.post_laurel_norm")

        def pull(slope: Array) -> tuple[Array, Array]:
            slope = slope * half
            return slope, slope + in_left(in_right(in_norm(slope)))

        return (low + x + hidden) * half, pull

    def _mlp(self, hidden: Array) -> tuple[Array, Pullback]:
        """The stream behind the MLP."""
        before = "pre_feedforward" if self.config.post_norms else "post_attention"
        x, in_norm = self._norm(hidden, f"{before}_layernorm")
        gate, in_gate = self._linear("mlp.gate_proj", x)
        up, in_up = self._linear("mlp.up_proj", x)
        gate, in_sparse = sparse(gate, self.config.sparsity(self.layer))
        y, in_gelu = gelu_gated(gate, up)
        out, in_down = self._linear("mlp.down_proj", y)
        out, in_experts = self._beside_experts(out)
        out, in_post = self._post_norm(out, "post_feedforward_layernorm")

        def pull(slope: Array) -> Array:
            at_gate, at_up = in_gelu(in_down(in_experts(in_post(slope))))
            return slope + in_norm(in_gate(in_sparse(at_gate)) + in_up(at_up))

        return hidden + out, pull

    def _beside_experts(self, out: Array) -> tuple[Array, Pullback]:
        """The MLP's output with that of the experts, whose gradient is left with the slope."""
        if self.config.experts is None:
            return out, _same
        assert self.beside.experts is not None
        out, in_norm = self._norm(out, "post_feedforward_layernorm_1")

        def pull(slope: Array) -> Array:
            self.slope.experts = slope
            return in_norm(slope)

        return out + self.beside.experts, pull

    def _end(self, hidden: Array, slope: Array) -> Array:
        """Gradient behind the MLP from that behind the layer."""
        if self.config.layer_scalar:
            slope = slope * self.weights["layer_scalar"]
        return slope + self._per_layer(hidden)(slope) if self.config.per_layer else slope

    def _per_layer(self, hidden: Array) -> Pullback:
        """Of `per_layer_output`."""
        gate, in_gate = product(hidden, self.weights["per_layer_input_gate"])
        told = per_layer_input(self.config, self.layer, self.weights, self.beside)
        y, in_gelu = gelu_gated(gate, told)
        out, in_product = product(y, self.weights["per_layer_projection"])
        in_norm = self._norm(out, "post_per_layer_input_norm")[1]
        return lambda slope: in_gate(in_gelu(in_product(in_norm(slope)))[0])

    def _linear(self, role: str, x: Array) -> tuple[Array, Pullback]:
        """A linear that is told of."""
        out, back = product(x, self.weights[role])

        def pull(slope: Array) -> Array:
            self.visit(role, flat(out), flat(slope))
            return back(slope)

        return out, pull

    def _norm(self, x: Array, name: str) -> tuple[Array, Pullback]:
        return norm(x, self.weights[name], self.config.rms_norm_eps)

    def _post_norm(self, out: Array, name: str) -> tuple[Array, Pullback]:
        """Of an output that joins the residual stream, in models that norm it."""
        return self._norm(out, name) if self.config.post_norms else (out, _same)

    def _by_head(self, y: Array) -> Array:
        """(batch, length, heads * dim) -> (batch, length, heads, dim)."""
        return y.reshape(*y.shape[:2], -1, self.config.layer_head_dim(self.layer))


def _same(slope: Array) -> Array:
    return slope
