"""The gradients of all tokens on their way back through a layer.

Of a mixture of experts, one expert is in memory at a time: each is read once for what the experts
add, and once for its gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from uq.formats.config import GemmaConfig
from uq.kernels.experts import DOWN, GATE_UP, choose
from uq.kernels.products import flat
from uq.kernels.weights import Weights
from uq.quantize.backward import LayerGradient
from uq.quantize.paths import Experts
from uq.quantize.pullbacks import Pullback, gelu_gated, norm, product

Array = NDArray[np.float32]


def pass_back(
    layers: Sequence[LayerGradient], experts: Experts, stream: Callable[[int], Array]
) -> None:
    """Take the gradients of all sequences from behind a layer to in front of it.

    Args:
        layers: the layer for each batch of them.
        stream: number of a batch -> its residual stream in front of the layer.
    """
    if layers[0].config.experts:
        return _pass_back_experts(layers, experts, stream)
    for index, here in enumerate(layers):
        here.back(stream(index))


def _pass_back_experts(
    layers: Sequence[LayerGradient], experts: Experts, stream: Callable[[int], Array]
) -> None:
    middles = [here.attention(stream(index))[0] for index, here in enumerate(layers)]
    weights, config = layers[0].weights, layers[0].config
    tokens = [RoutedSlope(config, weights, middle) for middle in middles]
    _with_each_expert(layers[0], experts, [one.add for one in tokens])
    for here, middle, one in zip(layers, middles, tokens, strict=True):
        here.beside.experts = one.finish()
        here.slope.stream = here.behind_attention(middle)
        here.beside.experts = None
        one.begin_back(here.slope.take_experts())
    _with_each_expert(layers[0], experts, [one.add_back for one in tokens])
    for index, (here, one) in enumerate(zip(layers, tokens, strict=True)):
        slope = here.slope.stream + one.finish_back()
        here.slope.stream = here.attention(stream(index))[1](slope)


def _with_each_expert(
    here: LayerGradient, experts: Experts, works: Sequence[Callable[[int, Array, Array], None]]
) -> None:
    assert here.config.experts is not None
    for number in range(here.config.experts.count):
        gate_up, down = (experts.expert(here.layer, role, number) for role in (GATE_UP, DOWN))
        for work in works:
            work(number, gate_up, down)


class RoutedSlope:
    """Some tokens on their way through the experts, and their gradient on its way back."""

    def __init__(self, config: GemmaConfig, weights: Weights, hidden: Array) -> None:
        """`hidden`: (batch, length, hidden) in front of the MLP."""
        self._shape, eps = hidden.shape, config.rms_norm_eps
        self._x, self._in_norm = norm(flat(hidden), weights["pre_feedforward_layernorm_2"], eps)
        self._indices, self._shares, self._in_router = routed(config, weights, flat(hidden))
        self._leave = partial(norm, gain=weights["post_feedforward_layernorm_2"], eps=eps)
        self._sum = np.zeros_like(self._x)  # (tokens, hidden) of what experts give, or its gradient
        self._at_x = np.zeros_like(self._x)
        self._at_shares = np.zeros_like(self._shares)  # (tokens, active)

    def add(self, number: int, gate_up: Array, down: Array) -> None:
        """What an expert gives."""
        tokens, places = np.nonzero(self._indices == number)
        out, _ = _expert(self._x[tokens], gate_up, down)
        self._sum[tokens] += out * self._shares[tokens, places, None]

    def finish(self) -> Array:
        """What all have added, (batch, length, hidden)."""
        return self._leave(self._sum)[0].reshape(self._shape)

    def begin_back(self, slope: Array) -> None:
        """`slope`: (batch, length, hidden) at what all have added."""
        self._sum = self._leave(self._sum)[1](flat(slope))

    def add_back(self, number: int, gate_up: Array, down: Array) -> None:
        """Through one expert, to its input and to its shares."""
        tokens, places = np.nonzero(self._indices == number)
        out, pull = _expert(self._x[tokens], gate_up, down)
        slope = self._sum[tokens]
        self._at_shares[tokens, places] = np.einsum("th,th->t", slope, out)
        self._at_x[tokens] += pull(slope * self._shares[tokens, places, None])

    def finish_back(self) -> Array:
        """What all add to the gradient in front of the MLP, (batch, length, hidden)."""
        found = self._in_norm(self._at_x) + self._in_router(self._at_shares)
        return found.reshape(self._shape)


def routed(
    config: GemmaConfig, weights: Weights, hidden: Array
) -> tuple[NDArray[np.intp], Array, Pullback]:
    """`route`: experts and shares of each token (tokens, hidden), and the pullback of the shares.

    Which experts are chosen does not change with a small step.
    """
    assert config.experts is not None
    gain = weights["router.scale"] * np.float32(config.hidden_size**-0.5)
    x, in_norm = norm(hidden, gain, config.rms_norm_eps)
    scores, in_product = product(x, weights["router.proj"])
    indices, shares = choose(config.experts, scores, np.ones(config.experts.count, np.float32))
    scale = weights["router.per_expert_scale"][indices]

    def pull(slope: Array) -> Array:
        along = slope * scale * shares
        at_scores = np.zeros_like(scores)
        at_top = along - shares * along.sum(axis=1, keepdims=True)
        np.put_along_axis(at_scores, indices, at_top, axis=1)
        return in_norm(in_product(at_scores))

    return indices, shares * scale, pull


def _expert(x: Array, gate_up: Array, down: Array) -> tuple[Array, Pullback]:
    """One expert's output for some tokens, (tokens, hidden) both."""
    both, in_both = product(x, gate_up)  # (tokens, 2 * intermediate)
    gate, up = (np.ascontiguousarray(part) for part in np.split(both, 2, axis=1))
    y, in_gelu = gelu_gated(gate, up)
    out, in_down = product(y, down)
    return out, lambda slope: in_both(np.concatenate(in_gelu(in_down(slope)), axis=1))
