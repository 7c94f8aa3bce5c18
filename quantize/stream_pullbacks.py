"""AltUp's steps as `kernels/altup.py` has them, each with its pullback.

Shapes: streams (batch, length, streams, hidden); hidden (batch, length, hidden).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from uq.formats.config import ALTUP_UNEMBED_PROJECTIONS, AltUp, GemmaConfig
from uq.kernels.altup import LEAST_SQUARE, Read
from uq.kernels.weights import Weights
from uq.quantize.pullbacks import Pullback, norm, product

Array = NDArray[np.float32]


def predicted(
    config: GemmaConfig, altup: AltUp, weights: Weights, streams: Array
) -> tuple[Array, Pullback]:
    """`predict`: each stream with a mixture of all added."""
    active = streams[..., altup.active, :].copy()
    modalities, in_modalities = _modalities(config, weights, active)
    flat_mixture, in_product = product(modalities, weights["altup.prediction_coefs"])
    mixture = flat_mixture.reshape(*streams.shape[:-1], altup.streams)  # (..., to, from)

    def pull(slope: Array) -> Array:
        found: Array = slope + mixture.swapaxes(-1, -2) @ slope
        at_mixture = slope @ streams.swapaxes(-1, -2)  # (..., to, from)
        at_active = in_modalities(in_product(at_mixture.reshape(flat_mixture.shape)))
        found[..., altup.active, :] += at_active
        return found

    return mixture @ streams + streams, pull


def corrected(
    config: GemmaConfig, altup: AltUp, weights: Weights, streams: Array, hidden: Array
) -> tuple[Array, Callable[[Array], tuple[Array, Array]]]:
    """`correct`: each stream moved by a share of what the active one was moved.

    The pullback gives the gradients at the streams and at `hidden`.
    """
    modalities, in_modalities = _modalities(config, weights, hidden)
    shares, in_product = product(modalities, weights["altup.correction_coefs"])
    shares = shares + np.float32(1)  # (batch, length, streams)
    moved = hidden - streams[..., altup.active, :]

    def pull(slope: Array) -> tuple[Array, Array]:
        at_shares = (slope @ moved[..., None])[..., 0]
        at_moved = (shares[..., None, :] @ slope)[..., 0, :]
        at_streams = slope.copy()
        at_streams[..., altup.active, :] -= at_moved
        return at_streams, at_moved + in_modalities(in_product(at_shares))

    return streams + shares[..., None] * moved[..., None, :], pull


def gathered(altup: AltUp, whole: Read, streams: Array) -> tuple[Array, Pullback]:
    """`gather`: the hidden state behind the last layer."""
    first = streams[..., 0, :].copy()
    total, pullbacks = first.copy(), []
    for index in range(1, altup.streams):
        weight = whole(f"{ALTUP_UNEMBED_PROJECTIONS}.{index - 1}.weight")
        x, in_product = product(streams[..., index, :], weight)
        part, in_sized = _sized(x, first)
        total += part
        pullbacks.append((in_product, in_sized))

    def pull(slope: Array) -> Array:
        slope = slope / np.float32(altup.streams)
        found = np.empty_like(streams)
        found[..., 0, :] = slope
        for index, (in_product, in_sized) in enumerate(pullbacks, start=1):
            at_x, at_first = in_sized(slope)
            found[..., index, :] = in_product(at_x)
            found[..., 0, :] += at_first
        return found

    return total / np.float32(altup.streams), pull


def _modalities(config: GemmaConfig, weights: Weights, x: Array) -> tuple[Array, Pullback]:
    """(batch, length, streams) in -1..1, of which the coefficients are linear functions."""
    normed, in_norm = norm(x, weights["altup.router_norm"], config.rms_norm_eps)
    share = np.float32(1 / config.hidden_size)
    raw, in_product = product(normed * share, weights["altup.modality_router"])
    found: Array = np.tanh(raw)
    return found, lambda slope: in_norm(in_product(slope * (1 - found**2)) * share)


def _sized(x: Array, like: Array) -> tuple[Array, Callable[[Array], tuple[Array, Array]]]:
    """x, each token's root mean square that of `like`; the gradients at both."""
    size, wanted = _mean_square(x), _mean_square(like)
    ratio = np.sqrt(wanted / np.maximum(size, LEAST_SQUARE))

    def pull(slope: Array) -> tuple[Array, Array]:
        along = np.mean(slope * x, axis=-1, keepdims=True) * ratio
        shrunk = np.where(size > LEAST_SQUARE, along / np.maximum(size, LEAST_SQUARE), 0)
        grown = along / np.maximum(wanted, np.float32(1e-30))
        return slope * ratio - x * shrunk, like * grown

    return x * ratio, pull


def _mean_square(x: Array) -> Array:
    mean: Array = np.square(x).mean(axis=-1, keepdims=True)
    return mean
