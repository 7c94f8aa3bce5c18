"""The residual streams of models with alternating updates, of a block of tokens.

A layer works on one of them, the residual stream of `Work`; what happens to the others is in
`uq.kernels.altup`, here with products that are sums over one row in a fixed order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from uq.formats.config import (
    ALTUP_PROJECTIONS,
    ALTUP_UNEMBED_PROJECTIONS,
    GemmaConfig,
    layer_tensor,
)
from uq.formats.manifest import gain_name
from uq.kernels.altup import active, correct, gather, predict, spread
from uq.kernels.cpu.extras import Beside, Extras
from uq.kernels.cpu.layout import WeightSource
from uq.kernels.cpu.products import multiplied
from uq.kernels.products import rms_norm

if TYPE_CHECKING:
    from uq.kernels.cpu.model import Work

Array = NDArray[np.float32]

NORM = "altup.router_norm"


class Streams:
    """The weights of alternating updates. Streams are (tokens, streams, hidden)."""

    def __init__(self, config: GemmaConfig, source: WeightSource) -> None:
        assert config.altup is not None
        self._config, self._altup = config, config.altup
        self._whole = {
            name: np.ascontiguousarray(source.array(name), np.float32)
            for name in config.model_kept()
            if name.startswith((ALTUP_PROJECTIONS, ALTUP_UNEMBED_PROJECTIONS))
        }
        self._layers = [self._layer(source, layer) for layer in range(config.num_layers)]

    @property
    def active_bytes(self) -> int:
        """Bytes that a token reads."""
        layers = (weight for weights in self._layers for weight in weights.values())
        return sum(weight.nbytes for weight in (*self._whole.values(), *layers))

    def spread(self, hidden: Array) -> Array:
        """The streams as layer 0 finds them; `hidden`, the embedding, becomes the active one."""
        streams = spread(self._altup, self._whole.__getitem__, hidden, multiplied)
        return self._enter(0, streams, hidden)

    def leave(self, layer: int, extras: Extras, work: Work, beside: Beside) -> None:
        """The streams behind a layer: moved by what it made of the active one, and told of the
        tokens. work.hidden becomes what the next layer finds, or what the final norm takes.
        """
        assert beside.streams is not None and beside.inputs is not None
        config, altup, weights = self._config, self._altup, self._layers[layer]
        streams = correct(config, altup, weights, beside.streams, work.hidden, multiplied)
        np.copyto(work.hidden, active(altup, streams))
        if altup.scaled:
            np.multiply(work.hidden, weights["altup.correct_output_scale"], out=work.hidden)
        extras.per_layer_branch(work, beside.inputs[layer])
        more = rms_norm(work.branch, extras.per_layer_gain, config.rms_norm_eps)
        streams[:, 1:] += more[:, None]
        if layer + 1 < config.num_layers:
            beside.streams = self._enter(layer + 1, streams, work.hidden)
        else:
            np.copyto(work.hidden, gather(altup, self._whole.__getitem__, streams, multiplied))

    def _enter(self, layer: int, streams: Array, hidden: Array) -> Array:
        """`predict`; hidden = the active stream."""
        streams = predict(self._config, self._altup, self._layers[layer], streams, multiplied)
        np.copyto(hidden, active(self._altup, streams))
        return streams

    def _layer(self, source: WeightSource, layer: int) -> dict[str, Array]:
        names = {
            role: layer_tensor(layer, role)
            for role in self._config.kept_shapes(layer)
            if role.startswith("altup.")
        }
        names[NORM] = gain_name(layer_tensor(layer, NORM))
        return {
            role: np.ascontiguousarray(source.array(name), np.float32)
            for role, name in names.items()
        }
