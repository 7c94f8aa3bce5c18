"""Scale search and rounding against slow twins in numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from uq.formats.spec import QuantTensor, Spec
from uq.quantize.scales import quantize_rtn, squared_error

Float = NDArray[Any]


def weights(rows: int = 48, cols: int = 256, seed: int = 0) -> NDArray[np.float32]:
    rng = np.random.default_rng(seed)
    return (0.02 * rng.standard_t(4, (rows, cols))).astype(np.float32)


def importances(cols: int = 256, seed: int = 1) -> NDArray[np.float32]:
    return np.random.default_rng(seed).lognormal(0, 1.5, cols).astype(np.float32)


def search_twin(weight: Float, importance: Float, group: int) -> Float:
    """Scales by the search's definition, all groups at once, in the dtype of `weight`."""
    kind = weight.dtype.type
    w = weight.reshape(-1, group)
    a = np.broadcast_to((importance / importance.mean()).astype(kind), weight.shape)
    a = a.reshape(-1, group)
    largest = np.take_along_axis(w, np.argmax(abs(w), axis=1)[:, None], axis=1)
    x = w * (kind(1) / largest)
    best = np.full(len(w), -1, kind)
    scale = np.zeros(len(w), kind)
    for k in range(-9, 10):
        codes = np.clip(np.rint(x * kind(np.float32(-(8 + 0.1 * k)))), -8, 7)
        s1, s2 = np.zeros(len(w), kind), np.zeros(len(w), kind)
        for i in range(group):
            s1 += a[:, i] * codes[:, i] * x[:, i]
            s2 += a[:, i] * codes[:, i] * codes[:, i]
        fit = s1 * s1 / s2
        scale = np.where(fit > best, s1 / s2 * largest[:, 0], scale)
        best = np.maximum(fit, best)
    return scale.reshape(len(weight), -1)


def relative_error(weight: Float, quantized: QuantTensor) -> float:
    error, energy = squared_error(weight, quantized)
    return float(np.sqrt(error / energy))


def weighted_error(weight: Float, quantized: QuantTensor, importance: Float) -> float:
    error = weight.astype(np.float64) - quantized.dequantize()
    return float((importance * error**2).sum())


@pytest.mark.parametrize("group", [32, 64, 128])
def test_search_equals_its_float32_twin(group: int) -> None:
    w, a = weights(), importances()
    found = quantize_rtn(w, Spec(4, group), a)
    np.testing.assert_array_equal(found.scales, search_twin(w, a, group).astype(np.float16))


def test_search_is_as_good_as_its_float64_twin() -> None:
    w, a = weights(rows=200), importances()
    found = quantize_rtn(w, Spec(4, 64), a)
    scales = search_twin(w.astype(np.float64), a.astype(np.float64), 64).astype(np.float16)
    twin = QuantTensor(nearest(w, scales, 64, -8, 7), scales, Spec(4, 64))
    # Candidates within float32 rounding of each other may be swapped, nothing else.
    assert weighted_error(w, found, a) == pytest.approx(weighted_error(w, twin, a), rel=1e-4)


def nearest(
    weight: Float, scales: NDArray[np.float16], group: int, low: int, high: int
) -> NDArray[np.int8]:
    spread = np.repeat(scales.astype(np.float32), group, axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        codes = np.where(spread == 0, 0, np.rint(weight.astype(np.float32) / spread))
    return np.clip(codes, low, high).astype(np.int8)


@pytest.mark.parametrize(("bits", "low", "high"), [(4, -8, 7), (8, -127, 127)])
def test_codes_are_nearest_on_the_stored_scales(bits: int, low: int, high: int) -> None:
    w = weights()
    found = quantize_rtn(w, Spec(bits, 64), importances())
    np.testing.assert_array_equal(found.codes, nearest(w, found.scales, 64, low, high))


def test_int8_scales_are_the_largest_magnitude_over_127() -> None:
    w = weights()
    expected = (abs(w).reshape(48, -1, 64).max(axis=2) / np.float32(127)).astype(np.float16)
    np.testing.assert_array_equal(quantize_rtn(w, Spec(8, 64)).scales, expected)


def test_search_beats_plain_absmax_and_importance_pays() -> None:
    w, a = weights(), importances()
    searched = weighted_error(w, quantize_rtn(w, Spec(4, 64), a), a)
    unweighted = weighted_error(w, quantize_rtn(w, Spec(4, 64)), a)
    scales = (abs(w).reshape(48, -1, 64).max(axis=2) / 7).astype(np.float16)
    absmax = QuantTensor(nearest(w, scales, 64, -8, 7), scales, Spec(4, 64))
    assert searched < unweighted < weighted_error(w, absmax, a)


@pytest.mark.parametrize("bits", [4, 8])
def test_groups_of_zeros_and_of_vanishing_weights_become_zero(bits: int) -> None:
    w = weights()
    w[3, 64:128] = 0
    w[5, :64] = 1e-12
    w[7, 128:192] = 1e-38
    found = quantize_rtn(w, Spec(bits, 64), importances())
    for row, start in ((3, 64), (5, 0), (7, 128)):
        assert found.scales[row, start // 64] == 0
        assert not found.codes[row, start : start + 64].any()
    assert np.isfinite(found.scales).all()


def test_unused_channels_still_get_a_fitting_scale() -> None:
    w, a = weights(), importances()
    a[:64] = 0
    error = relative_error(w[:, :64], quantize_rtn(w[:, :64], Spec(4, 64), np.zeros(64, "f4")))
    assert error < 0.15
    found = quantize_rtn(w, Spec(4, 64), a)
    assert relative_error(w[:, :64], part(found, slice(0, 64))) < 0.15


def part(tensor: QuantTensor, cols: slice) -> QuantTensor:
    groups = slice(cols.start // tensor.spec.group, cols.stop // tensor.spec.group)
    codes = np.ascontiguousarray(tensor.codes[:, cols])
    return QuantTensor(codes, np.ascontiguousarray(tensor.scales[:, groups]), tensor.spec)


def test_row_blocks_give_the_bytes_of_the_whole() -> None:
    w, a = weights(), importances()
    whole = quantize_rtn(w, Spec(4, 32), a)
    upper, lower = quantize_rtn(w[:17], Spec(4, 32), a), quantize_rtn(w[17:], Spec(4, 32), a)
    np.testing.assert_array_equal(whole.codes, np.vstack([upper.codes, lower.codes]))
    np.testing.assert_array_equal(whole.scales, np.vstack([upper.scales, lower.scales]))


@pytest.mark.parametrize("bits", [4, 8])
def test_squared_error_is_that_of_the_dequantized_weight(bits: int) -> None:
    w = weights()
    found = quantize_rtn(w, Spec(bits, 64))
    difference = w.astype(np.float64) - found.dequantize()
    expected = np.linalg.norm(difference) / np.linalg.norm(w.astype(np.float64))
    assert relative_error(w, found) == pytest.approx(expected, rel=1e-5)
    assert not squared_error(np.zeros_like(w), quantize_rtn(np.zeros_like(w), found.spec)).any()
