"""Coordinate descent, equalized channels, and the moments behind them."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from uq.formats.spec import QuantTensor, Spec
from uq.quantize.descent import descend
from uq.quantize.equalize import LIMIT, channel_scale
from uq.quantize.moments import Inputs, statistics, token_weights, undo_norm
from uq.quantize.scales import quantize_rtn

RNG = np.random.default_rng(0)
Matrix = NDArray[np.float64]


def inputs(tokens: int = 600, n: int = 64) -> NDArray[np.float32]:
    mixing = RNG.standard_normal((n, n)) * np.exp(RNG.standard_normal(n))
    return (RNG.standard_normal((tokens, n)) @ mixing).astype(np.float32)


def output_error(target: Matrix, tensor: QuantTensor, hessian: Matrix) -> Matrix:
    miss = target - tensor.dequantize()
    errors: Matrix = np.einsum("ri,ij,rj->r", miss, hessian, miss)
    return errors


@pytest.mark.parametrize(
    "spec", [Spec(4, 32), Spec(4, 32, True), Spec(5, 64), Spec(8, 64)], ids=str
)
def test_no_single_code_can_be_moved_to_a_smaller_error(spec: Spec) -> None:
    x = inputs()
    hessian = (x.T @ x).astype(np.float64) / len(x)
    target = RNG.standard_normal((8, 64))
    start = quantize_rtn(target.astype(np.float32), spec)
    found = start
    for _ in range(10):  # sweeps until nothing moves
        codes = descend(target, found, hessian)
        found = QuantTensor(codes, found.scales, spec, found.zeros)
    assert (output_error(target, found, hessian) <= output_error(target, start, hessian)).all()
    assert found.codes.min() >= spec.qmin and found.codes.max() <= spec.qmax
    best = output_error(target, found, hessian)
    for col in range(0, 64, 7):
        for step in (-1, 1):
            codes = found.codes.copy()
            codes[:, col] = np.clip(codes[:, col].astype(int) + step, spec.qmin, spec.qmax)
            moved = QuantTensor(codes, found.scales, spec, found.zeros)
            assert (output_error(target, moved, hessian) >= best - 1e-9 * best.max()).all()


def test_channel_scales_are_powers_of_two_around_one() -> None:
    importance = np.exp(4 * RNG.standard_normal(200)).astype(np.float32)
    importance[3] = 0
    scale = channel_scale(importance, 0.5)
    exponents = np.log2(scale)
    np.testing.assert_array_equal(exponents, np.rint(exponents))
    assert abs(exponents).max() <= LIMIT and scale[3] == 1
    loud, quiet = (
        importance > np.quantile(importance, 0.9),
        importance < np.quantile(importance, 0.1),
    )
    assert scale[loud].min() > 1 > scale[quiet & (importance > 0)].max()
    np.testing.assert_array_equal(channel_scale(importance, 0.0), 1)
    np.testing.assert_array_equal(channel_scale(np.zeros(4, np.float32), 0.5), 1)


def test_equalizing_is_exact() -> None:
    x, weight = inputs(), RNG.standard_normal((32, 64)).astype(np.float32)
    scale = channel_scale(np.square(x).mean(0), 0.5)
    np.testing.assert_array_equal((x / scale) * (weight[:1] * scale), x * weight[:1])


def test_moments_weigh_tokens() -> None:
    x, exact = inputs(), inputs()
    weight = RNG.random((600, 1)).astype(np.float32)
    lost = RNG.standard_normal((600, 16)).astype(np.float32)
    halves = [
        Inputs(x[half], exact[half], weight[half], lost[half])
        for half in (slice(0, 200), slice(200, 600))
    ]
    found = statistics(halves)
    x64, total = x.astype(np.float64), weight.sum(dtype=np.float64)
    pairs = [
        (found.hessian, x64),
        (found.cross, exact.astype(np.float64) - x),
        (found.wanted, lost.astype(np.float64)),
    ]
    for moments, left in pairs:
        assert moments is not None
        expected = (left * weight).T @ x64 / total
        np.testing.assert_allclose(moments, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_small_outputs_count_more_within_bounds() -> None:
    sizes = [np.array([[1.0], [100.0]], np.float32), np.array([[1e-6], [1.0], [4.0]], np.float32)]
    first, second = token_weights(sizes, 10.0)
    np.testing.assert_allclose(first[:, 0], [1.0, 0.1])
    np.testing.assert_allclose(second[:, 0], [10.0, 1.0, 0.25])
    assert all((weight == 1).all() for weight in token_weights(sizes, 1.0))


def test_what_is_added_in_front_of_a_norm_appears_behind_it() -> None:
    rows, eps = 64, 1e-6
    out = RNG.standard_normal((5, rows)).astype(np.float32)
    gain = (3 + RNG.random(rows)).astype(np.float32)
    error = 1e-3 * RNG.standard_normal((5, rows)).astype(np.float32)
    size = np.mean(out**2, axis=-1, keepdims=True) + np.float32(eps)
    added = undo_norm(error, size, gain)
    behind = (out + added) / np.sqrt(size) * gain - out / np.sqrt(size) * gain
    # The ridge takes a tenth of what gains of one size would restore.
    assert np.corrcoef(behind.ravel(), error.ravel())[0, 1] > 0.99
    np.testing.assert_allclose(behind, error / 1.1, rtol=0, atol=2e-4)
