"""What Gemma 3n computes beside attention, and in front of the MLP's gate, in float32."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from uq.formats.config import GemmaConfig
from uq.kernels.products import linear, rms_norm
from uq.kernels.weights import Weights

Array = NDArray[np.float32]


def add_laurel(config: GemmaConfig, weights: Weights, hidden: Array, x: Array) -> Array:
    """The residual stream behind a learned augmented residual layer: x and a product of low rank of
    it (Menghani et al., LAuReL). The sum is divided by sqrt(2).

    Args:
        hidden: (batch, length, hidden) residual stream behind attention.
        x: (batch, length, hidden) input of attention.
    """
    low = linear(linear(x, weights["laurel.linear_left"]), weights["laurel.linear_right"])
    low = rms_norm(low, weights["laurel.post_laurel_norm"], config.rms_norm_eps)
    low += x
    low += hidden
    low *= np.float32(math.sqrt(0.5))
    return low


def keep_largest(gate: Array, sparsity: float) -> None:
    """In place: what a token's channels exceed a threshold by, else 0, (..., channels).

    The threshold lets `1 - sparsity` of normally distributed channels through: mean + z * deviation
    with the normal quantile z of `sparsity`.
    """
    quantile = np.float32(NormalDist().inv_cdf(sparsity))
    mean = gate.mean(axis=-1, keepdims=True, dtype=np.float64)
    deviation = gate.std(axis=-1, keepdims=True, dtype=np.float64)
    gate -= (mean + quantile * deviation).astype(np.float32)
    np.maximum(gate, 0, out=gate)
