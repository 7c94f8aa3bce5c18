"""float16 in compiled loops against numpy's."""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

from uq.formats.half import to_half, widen


@njit  # type: ignore[untyped-decorator]
def narrow(values: NDArray[np.float32], bits: NDArray[np.uint16]) -> None:
    for i in range(len(values)):
        bits[i] = to_half(values[i])


def test_widen_is_exact_for_every_float16() -> None:
    every = np.arange(1 << 16).astype(np.uint16).view(np.float16)
    np.testing.assert_array_equal(widen(every), every.astype(np.float32))


def test_widen_keeps_the_shape_and_takes_unaligned_data() -> None:
    data = np.arange(97, dtype=np.uint8)[1:].view("<f2").reshape(6, 8)
    assert not data.flags.aligned
    np.testing.assert_array_equal(widen(data), data.astype(np.float32))


def test_to_half_rounds_like_numpy() -> None:
    rng = np.random.default_rng(0)
    values = np.exp2(rng.uniform(-30, 15, 20000)).astype(np.float32) * rng.choice([-1, 1], 20000)
    ties = (np.arange(2048, 4096) + np.float32(0.5)).astype(np.float32)
    values = np.concatenate([values, ties, [0, -0.0, 65504]]).astype(np.float32)
    bits = np.empty(len(values), np.uint16)
    narrow(values, bits)
    np.testing.assert_array_equal(bits, values.astype(np.float16).view(np.uint16))
