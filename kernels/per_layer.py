"""Per-layer embeddings, in float32: what each layer is told of a token beside its hidden state."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from uq.formats.config import PER_LAYER_NORM, PER_LAYER_PROJECTION, GemmaConfig, PerLayerEmbedding
from uq.kernels.elementwise import gelu_product
from uq.kernels.products import flat, linear, rms_norm
from uq.kernels.weights import Weights

Array = NDArray[np.float32]


@dataclass
class Beside:
    """What goes with some sequences through the layers, beside their hidden states.

    Attributes:
        embedded: (batch, length, hidden) in front of layer 0, in models with per-layer embeddings.
        rows: layer -> (batch, length, size), its part of the per-layer embedding, unscaled.
        streams: (batch, length, streams, hidden), in models with alternating updates.
        shared: layer -> its keys and values, where later layers read them.
        experts: (batch, length, hidden), `experts_output` of the layer in work where it is known.
        tokens: (batch, length) int32, where who runs the next layer finds their rows himself.
    """

    embedded: Array | None = None
    rows: Callable[[int], Array] | None = None
    streams: Array | None = None
    shared: dict[int, tuple[Array, Array]] = field(default_factory=dict)
    experts: Array | None = None
    tokens: NDArray[np.int32] | None = None


def stored_tokens(table: PerLayerEmbedding, tokens: NDArray[np.int32]) -> NDArray[np.int32]:
    """Rows of the per-layer embedding for some tokens: those beyond its end share the first one."""
    return np.where(tokens < table.vocab_size, tokens, np.int32(0))


def per_layer_input(config: GemmaConfig, layer: int, weights: Weights, beside: Beside) -> Array:
    """(batch, length, size): half from the token's row, half from its embedding.

    (norm(P x / sqrt(hidden)) + row * sqrt(size)) / sqrt(2), of the layer's channels.
    """
    assert config.per_layer is not None and beside.embedded is not None and beside.rows is not None
    size = config.per_layer.size
    projected = linear(beside.embedded, weights[PER_LAYER_PROJECTION])
    projected *= np.float32(config.hidden_size**-0.5)
    out = rms_norm(projected, weights[PER_LAYER_NORM], config.rms_norm_eps)
    out += beside.rows(layer) * np.float32(math.sqrt(size))
    out *= np.float32(math.sqrt(0.5))
    return out


def per_layer_output(
    config: GemmaConfig, layer: int, weights: Weights, hidden: Array, beside: Beside
) -> Array:
    """What a layer's part of the per-layer embedding adds: (batch, length, hidden)."""
    gate = linear(hidden, weights["per_layer_input_gate"])
    gelu_product(flat(gate), flat(per_layer_input(config, layer, weights, beside)))
    out = linear(gate, weights["per_layer_projection"])
    return rms_norm(out, weights["post_per_layer_input_norm"], config.rms_norm_eps)
