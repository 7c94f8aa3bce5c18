"""The compiled float32 kernels against their formulas in float64."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from uq.kernels.elementwise import exp32, gelu_product, masked_softmax, rms_norm_rows, rotate

RNG = np.random.default_rng(0)


def normal(*shape: int, scale: float = 1.0) -> NDArray[np.float32]:
    return (RNG.standard_normal(shape) * scale).astype(np.float32)


def test_exp() -> None:
    x = np.concatenate([np.linspace(-87, 88, 5_001), normal(5_000) * 1e-3]).astype(np.float32)
    actual = np.array([exp32(value) for value in x])
    np.testing.assert_allclose(actual, np.exp(x.astype(np.float64)), rtol=1.2e-7)


def test_exp_beyond_its_range() -> None:
    assert exp32(np.float32(-1e30)) == exp32(np.float32(-87)) < 1e-37
    assert exp32(np.float32(1e30)) == exp32(np.float32(88)) > 1e38
    assert np.isnan(exp32(np.float32(np.nan)))


def test_rms_norm() -> None:
    x, gain = normal(9, 101, scale=30), normal(101)
    out = np.empty_like(x)
    rms_norm_rows(x, gain, np.float32(1e-3), out)
    wide = x.astype(np.float64)
    expected = wide / np.sqrt((wide**2).mean(axis=1, keepdims=True) + 1e-3) * gain
    np.testing.assert_allclose(out, expected, rtol=1e-6)


def test_gelu_product() -> None:
    gate, up = normal(7, 333, scale=6), normal(7, 333)
    x = gate.astype(np.float64)
    gelu = 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    gelu_product(gate, up)
    np.testing.assert_allclose(gate, gelu * up, rtol=2e-6, atol=1e-6)


def test_tail_of_gelu_is_zero() -> None:
    """Its squares would be subnormal."""
    gate = np.linspace(-12, -1, 500, dtype=np.float32)[None]
    x = gate[0].astype(np.float64)
    gelu_product(gate, np.ones_like(gate))
    assert (gate[0, x < -7] == 0).all()
    assert (gate[0, x > -6] != 0).all()
    exact = x / (1 + np.exp(-2 * np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    np.testing.assert_allclose(gate[0], exact, rtol=2e-5, atol=2e-14)


def test_rotation_of_component_pairs() -> None:
    """Components i and i + dim / 2 are the parts of a complex number that turns."""
    x, angle = normal(2, 5, 3, 14), RNG.uniform(0, 7, (5, 7))
    number = x[..., :7].astype(np.float64) + 1j * x[..., 7:]
    turned = number * np.exp(1j * angle)[None, :, None, :]
    rotate(x, np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32))
    np.testing.assert_allclose(x[..., :7] + 1j * x[..., 7:], turned, atol=1e-6)


@pytest.mark.parametrize("softcap", [0.0, 4.0])
@pytest.mark.parametrize("window", [1, 3, 100])
def test_masked_softmax(window: int, softcap: float) -> None:
    """Three queries of two heads each, the first at key 4 of 7."""
    raw = normal(6, 7, scale=20)
    expected = np.zeros((6, 7))
    for row, scores in enumerate(raw.astype(np.float64) * 0.3):
        own = 4 + row // 2
        seen = slice(max(0, own - window + 1), own + 1)
        capped = softcap * np.tanh(scores / softcap) if softcap else scores
        expected[row, seen] = np.exp(capped[seen]) / np.exp(capped[seen]).sum()
    masked_softmax(raw, 2, 4, window, 0.3, softcap)
    np.testing.assert_allclose(raw, expected, atol=1e-6)


def test_nan_is_not_hidden_by_softmax() -> None:
    scores = normal(1, 40)
    scores[0, 17] = np.nan
    masked_softmax(scores, 1, 39, 40, 1.0, 0.0)
    assert np.isnan(scores).all()
