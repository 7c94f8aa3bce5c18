"""Matrix products and norms over all leading axes of float32 arrays."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from uq.kernels.elementwise import rms_norm_rows

Array = NDArray[np.float32]


def flat(x: Array) -> Array:
    """(..., n) -> (rows, n)."""
    return x.reshape(-1, x.shape[-1])


def linear(x: Array, weight: Array) -> Array:
    """x @ weight.T as one matrix product over all leading axes."""
    return (flat(x) @ weight.T).reshape(*x.shape[:-1], weight.shape[0])


def rms_norm(x: Array, gain: Array, eps: float) -> Array:
    """x / sqrt(mean(x^2) + eps) * gain over the last axis (Zhang and Sennrich, RMSNorm)."""
    out = np.empty_like(x)
    rms_norm_rows(flat(x), gain, np.float32(eps), flat(out))
    return out
