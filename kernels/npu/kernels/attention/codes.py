"""Codes and scales of rows: plain, and with the error of each channel fed into the next ones."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from uq.kernels.elementwise import kernel

Array = NDArray[np.float32]
Codes = NDArray[np.int8]
QueryCodes = NDArray[np.int16]
LIMB = 256  # of the high half of a query's code
RANGE = {4: (-8, 7), 8: (-127, 127), 16: (-127 * LIMB, 127 * LIMB)}
SHRINK = np.linspace(1, 0.65, 8, dtype=np.float32)  # of a scale of 4 bits: those that are tried


def quantize(x: Array, bits: int) -> tuple[NDArray[Any], Array]:
    """Symmetric codes (int8; int16 of 16 bits) and one scale for each row (..., channels).

    Codes of 8 and 16 bits reach as far to both sides. INT4 codes are -8..7 and the largest
    magnitude has the sign of -8, so scales have a sign.
    """
    scale = scales(x, bits)
    return _rounded(x, scale, bits).astype(np.int16 if bits == 16 else np.int8), scale


def scales(x: Array, bits: int) -> Array:
    """(...) of rows (..., channels): the largest magnitude has the last code.

    In INT4, where it is better to cut off a little, the scale of some with the least squared error.
    """
    if bits != 4:
        ends: Array = np.abs(x).max(axis=-1) / np.float32(RANGE[bits][1])
        return ends
    largest = np.abs(x).argmax(axis=-1)[..., None]
    ends = np.take_along_axis(x, largest, axis=-1)[..., 0] / np.float32(-8)
    tried = ends * SHRINK.reshape(-1, *[1] * ends.ndim)
    errors = [((_rounded(x, s, 4) * s[..., None] - x) ** 2).sum(axis=-1) for s in tried]
    best: Array = np.take_along_axis(tried, np.argmin(errors, axis=0)[None], axis=0)[0]
    return best


def _rounded(x: Array, scale: Array, bits: int) -> Array:
    codes: Array = np.rint(x / _nonzero(scale)[..., None]).clip(*RANGE[bits])
    return codes


def _nonzero(scale: Array) -> Array:
    return np.where(scale == 0, np.float32(1), scale)


def limbs(codes: QueryCodes) -> tuple[Codes, Codes]:
    """int8 `high` and `low` with codes = 256 high + low."""
    high = (codes.astype(np.int32) + LIMB // 2) // LIMB
    return high.astype(np.int8), (codes - high * LIMB).astype(np.int8)


def round_with_feedback(x: Array, bits: int, triangle: Array) -> tuple[Codes, Array]:
    """Codes and scales of rows (rows, channels) whose errors e have a small |triangle e|.

    From the last channel to the first: what the ones behind it got wrong is taken off by the next
    (the rounding of QuIP, Chee et al. 2023).

    Args:
        triangle: (channels, channels) upper, with ones on its diagonal.
    """
    scale = scales(x, bits)
    codes = np.empty(x.shape, np.int8)
    units = np.ascontiguousarray(x / _nonzero(scale)[..., None])
    _feed_back(units, triangle, *map(np.float32, RANGE[bits]), codes)
    return codes, scale


@kernel
def _feed_back(units: Any, triangle: Any, low: Any, high: Any, codes: Any) -> None:
    rows, channels = units.shape
    error = np.empty(channels, np.float32)
    for row in range(rows):
        for channel in range(channels - 1, -1, -1):
            wanted = units[row, channel]
            for other in range(channel + 1, channels):
                wanted -= triangle[channel, other] * error[other]
            code = min(max(np.rint(wanted), low), high)
            error[channel] = code - units[row, channel]
            codes[row, channel] = np.int8(code)


def rotate(x: Array) -> Array:
    """A Hadamard transform over the channels, its own inverse: it spreads outliers and keeps every
    q . k."""
    return x @ hadamard(x.shape[-1])


@cache
def hadamard(size: int) -> Array:
    """Sylvester's orthonormal matrix, (size, size)."""
    matrix: Array = np.ones((1, 1), np.float32)
    while len(matrix) < size:
        matrix = np.kron(matrix, np.array([[1, 1], [1, -1]], np.float32))
    matrix /= np.sqrt(np.float32(size))
    return matrix
