"""AltUp in float32: several residual streams, of which a layer computes one and guesses the others
(Baykal et al., Alternating Updates for Efficient Transformers).

Shapes: streams (batch, length, streams, hidden), or with any other axes in front; weights by role,
linears (out, in). A device whose sums have an order of their own gives its `product`.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from uq.formats.config import ALTUP_PROJECTIONS, ALTUP_UNEMBED_PROJECTIONS, AltUp, GemmaConfig
from uq.kernels.products import linear, rms_norm
from uq.kernels.weights import Weights

Array = NDArray[np.float32]
Read = Callable[[str], Array]
Product = Callable[[Array, Array], Array]  # as `linear`

LEAST_SQUARE = np.float32(1e-5)  # of a projection, whose size is divided by


def spread(altup: AltUp, whole: Read, embedded: Array, product: Product = linear) -> Array:
    """The streams in front of layer 0: the embedding, and projections of it, each of its size.

    Args:
        whole: canonical name -> a tensor of no layer.
    """
    others = (
        _sized(product(embedded, whole(f"{ALTUP_PROJECTIONS}.{index}.weight")), embedded)
        for index in range(altup.streams - 1)
    )
    return np.stack([embedded, *others], axis=-2)


def gather(altup: AltUp, whole: Read, streams: Array, product: Product = linear) -> Array:
    """The hidden state behind the last layer: the mean of the first stream and of projections of
    the others, each of its size. (batch, length, hidden).
    """
    first = streams[..., 0, :]
    total = first.copy()
    for index in range(altup.streams - 1):
        weight = whole(f"{ALTUP_UNEMBED_PROJECTIONS}.{index}.weight")
        total += _sized(product(streams[..., index + 1, :], weight), first)
    total /= np.float32(altup.streams)
    return total


def predict(
    config: GemmaConfig,
    altup: AltUp,
    weights: Weights,
    streams: Array,
    product: Product = linear,
) -> Array:
    """The streams as the layer finds them: each with a mixture of all added."""
    count = altup.streams
    modalities = _modalities(config, weights, active(altup, streams), product)
    mixture = product(modalities, weights["altup.prediction_coefs"])
    mixture = mixture.reshape(*streams.shape[:-2], count, count)  # (..., to, from)
    predicted: Array = mixture @ streams
    predicted += streams
    return predicted


def correct(
    config: GemmaConfig,
    altup: AltUp,
    weights: Weights,
    predicted: Array,
    hidden: Array,
    product: Product = linear,
) -> Array:
    """The streams behind the layer: each moved by a share of what the active one was moved.

    Args:
        hidden: (batch, length, hidden) what the layer made of the active stream.
    """
    modalities = _modalities(config, weights, hidden, product)
    shares = product(modalities, weights["altup.correction_coefs"])
    shares += np.float32(1)  # (batch, length, streams)
    moved = hidden - active(altup, predicted)
    corrected: Array = shares[..., None] * moved[..., None, :]
    corrected += predicted
    return corrected


def active(altup: AltUp, streams: Array) -> Array:
    """A copy of the stream that layers compute: (batch, length, hidden)."""
    return streams[..., altup.active, :].copy()


def _modalities(config: GemmaConfig, weights: Weights, x: Array, product: Product) -> Array:
    """(batch, length, streams) in -1..1, of which the coefficients are linear functions."""
    x = rms_norm(x, weights["altup.router_norm"], config.rms_norm_eps)
    x *= np.float32(1 / config.hidden_size)
    return np.tanh(product(x, weights["altup.modality_router"]))


def _sized(x: Array, like: Array) -> Array:
    """x, each token's root mean square that of `like`."""
    x *= np.sqrt(_mean_square(like) / np.maximum(_mean_square(x), LEAST_SQUARE))
    return x


def _mean_square(x: Array) -> Array:
    mean: Array = np.square(x).mean(axis=-1, keepdims=True)
    return mean
