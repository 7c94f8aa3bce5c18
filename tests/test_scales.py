"""Scale search and rounding against slow twins in numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from uq.formats.spec import SPECS, QuantTensor, Spec
from uq.quantize.scales import quantize_rtn, round_symmetric, squared_error

Float = NDArray[Any]
WITH_ZEROS = [spec for spec in SPECS if spec.zero_point]
SYMMETRIC = [spec for spec in SPECS if not spec.zero_point and spec.bits < 8]


def weights(rows: int = 48, cols: int = 256, seed: int = 0) -> NDArray[np.float32]:
    rng = np.random.default_rng(seed)
    return (0.02 * rng.standard_t(4, (rows, cols))).astype(np.float32)


def importances(cols: int = 256, seed: int = 1) -> NDArray[np.float32]:
    return np.random.default_rng(seed).lognormal(0, 1.5, cols).astype(np.float32)


def fused(a: Float, b: Float, c: Float | int) -> Float:
    """a b + c of float32 without rounding the product, in float64."""
    return a.astype(np.float64) * b.astype(np.float64) + c


def search_twin(weight: Float, importance: Float, spec: Spec) -> Float:
    """Scales by the search's definition, all groups at once, in the dtype of `weight`."""
    kind, group, half = weight.dtype.type, spec.group, -spec.qmin
    w = weight.reshape(-1, group)
    a = np.broadcast_to((importance / importance.mean()).astype(kind), weight.shape)
    a = a.reshape(-1, group)
    largest = np.take_along_axis(w, np.argmax(abs(w), axis=1)[:, None], axis=1)
    x = w * (kind(1) / largest)
    best = np.full(len(w), -1, kind)
    scale = np.zeros(len(w), kind)
    for k in range(-9, 10):
        step = kind(np.float32(-(half + half / 80 * k)))
        codes = np.clip(np.rint(fused(x, step, 0)), spec.qmin, spec.qmax).astype(kind)
        s1, s2 = np.zeros(len(w), kind), np.zeros(len(w), kind)
        for i in range(group):
            weighted = a[:, i] * codes[:, i]
            s1 = fused(weighted, x[:, i], s1).astype(kind)
            s2 = fused(weighted, codes[:, i], s2).astype(kind)
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


@pytest.mark.parametrize("spec", SYMMETRIC, ids=str)
def test_search_equals_its_float32_twin(spec: Spec) -> None:
    w, a = weights(), importances()
    found = quantize_rtn(w, spec, a)
    np.testing.assert_array_equal(found.scales, search_twin(w, a, spec).astype(np.float16))


@pytest.mark.parametrize("spec", [Spec(4, 64), Spec(5, 32), Spec(6, 128)], ids=str)
def test_search_is_as_good_as_its_float64_twin(spec: Spec) -> None:
    w, a = weights(rows=200), importances()
    found = quantize_rtn(w, spec, a)
    scales = search_twin(w.astype(np.float64), a.astype(np.float64), spec).astype(np.float16)
    twin = QuantTensor(nearest(w, scales, spec.group, spec.qmin, spec.qmax), scales, spec)
    # Candidates within float32 rounding of each other may be swapped, nothing else.
    assert weighted_error(w, found, a) == pytest.approx(weighted_error(w, twin, a), rel=1e-4)


def nearest(
    weight: Float, scales: NDArray[np.float16], group: int, low: int, high: int
) -> NDArray[np.int8]:
    spread = np.repeat(scales.astype(np.float32), group, axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        codes = np.where(spread == 0, 0, np.rint(weight.astype(np.float32) / spread))
    return np.clip(codes, low, high).astype(np.int8)


@pytest.mark.parametrize(
    ("bits", "low", "high"), [(4, -8, 7), (5, -16, 15), (6, -32, 31), (8, -127, 127)]
)
def test_codes_are_nearest_on_the_stored_scales(bits: int, low: int, high: int) -> None:
    w = weights()
    found = quantize_rtn(w, Spec(bits, 64), importances())
    np.testing.assert_array_equal(found.codes, nearest(w, found.scales, 64, low, high))


def test_int8_scales_are_the_largest_magnitude_over_127() -> None:
    w = weights()
    expected = (abs(w).reshape(48, -1, 64).max(axis=2) / np.float32(127)).astype(np.float16)
    np.testing.assert_array_equal(quantize_rtn(w, Spec(8, 64)).scales, expected)


@pytest.mark.parametrize("bits", [4, 5, 6])
def test_search_beats_plain_absmax_and_importance_pays(bits: int) -> None:
    w, a, spec = weights(), importances(), Spec(bits, 64)
    searched = weighted_error(w, quantize_rtn(w, spec, a), a)
    unweighted = weighted_error(w, quantize_rtn(w, spec), a)
    scales = (abs(w).reshape(48, -1, 64).max(axis=2) / spec.qmax).astype(np.float16)
    absmax = QuantTensor(nearest(w, scales, 64, spec.qmin, spec.qmax), scales, spec)
    assert searched < unweighted < weighted_error(w, absmax, a)


@pytest.mark.parametrize("group", [32, 64, 128])
def test_every_width_and_every_zero_point_pays(group: int) -> None:
    w, a = weights(), importances()
    specs = [Spec(bits, group, zero) for bits in (4, 5, 6) for zero in (False, True)]
    errors = [weighted_error(w, quantize_rtn(w, spec, a), a) for spec in (*specs, Spec(8, group))]
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("spec", WITH_ZEROS, ids=str)
def test_no_grid_of_a_finer_search_is_much_better(spec: Spec) -> None:
    """Every zero point with every scale of a fine range; 1.1 in squares is 5 % of the error."""
    w, a = weights(rows=6), importances()
    found = weighted_error(w, quantize_rtn(w, spec, a), a)
    assert found <= 1.1 * finest_search(w.astype(np.float64), a, spec)


def finest_search(weight: Float, importance: Float, spec: Spec) -> float:
    """Sum over the groups of the least weighted error that any grid leaves."""
    w = weight.reshape(-1, spec.group)
    a = np.broadcast_to(importance, weight.shape).reshape(w.shape)
    span = spec.qmax - spec.qmin
    reach = np.minimum(w.min(axis=1), 0), np.maximum(w.max(axis=1), 0)
    best = np.full(len(w), np.inf)
    for zero in range(spec.qmin, spec.qmax + 1, spec.zero_step):
        for factor in np.linspace(0.85, 1.25, 81):
            x = w * (span * factor / (reach[1] - reach[0]))[:, None]
            levels = np.rint(x).clip(spec.qmin - zero, spec.qmax - zero)
            fit = (a * w * levels).sum(1) ** 2 / np.maximum((a * levels**2).sum(1), 1e-30)
            best = np.minimum(best, (a * w * w).sum(1) - fit)
    return float(best.sum())


@pytest.mark.parametrize("spec", WITH_ZEROS, ids=str)
@pytest.mark.parametrize("sign", [1, -1])
def test_one_sided_groups_use_every_code(spec: Spec, sign: int) -> None:
    w = (sign * np.linspace(0, 1, 2 * spec.group, dtype=np.float32)).reshape(2, -1)
    found = quantize_rtn(w, spec)
    unused = 0 if sign > 0 else spec.zero_step - 1
    assert found.codes.max() - found.codes.min() >= spec.qmax - spec.qmin - unused - 1
    assert np.abs(found.dequantize() - w).max() < 0.6 / (spec.qmax - spec.qmin - unused)


@pytest.mark.parametrize("spec", WITH_ZEROS, ids=str)
def test_codes_are_nearest_on_the_stored_scales_and_zero_points(spec: Spec) -> None:
    w = weights()
    found = quantize_rtn(w, spec, importances())
    assert found.zeros is not None
    assert not (found.zeros % spec.zero_step).any()
    spread, zeros = (x.repeat(spec.group, axis=1) for x in (found.scales, found.zeros))
    codes = np.rint(w / spread.astype(np.float32)) + zeros
    np.testing.assert_array_equal(found.codes, codes.clip(spec.qmin, spec.qmax))


@pytest.mark.parametrize("spec", [Spec(4, 64), Spec(8, 64), Spec(5, 64, True)], ids=str)
def test_groups_of_zeros_and_of_vanishing_weights_become_zero(spec: Spec) -> None:
    w = weights()
    w[3, 64:128] = 0
    w[5, :64] = 1e-12
    w[7, 128:192] = 1e-38
    found = quantize_rtn(w, spec, importances())
    for row, start in ((3, 64), (5, 0), (7, 128)):
        assert found.scales[row, start // 64] == 0
        assert not found.codes[row, start : start + 64].any()
        assert found.zeros is None or found.zeros[row, start // 64] == 0
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


@pytest.mark.parametrize("spec", [Spec(4, 32), Spec(6, 32, True)], ids=str)
def test_row_blocks_give_the_bytes_of_the_whole(spec: Spec) -> None:
    w, a = weights(), importances()
    whole = quantize_rtn(w, spec, a)
    upper, lower = quantize_rtn(w[:17], spec, a), quantize_rtn(w[17:], spec, a)
    np.testing.assert_array_equal(whole.codes, np.vstack([upper.codes, lower.codes]))
    np.testing.assert_array_equal(whole.scales, np.vstack([upper.scales, lower.scales]))


@pytest.mark.parametrize("spec", [Spec(4, 64), Spec(8, 64), Spec(5, 64, True)], ids=str)
def test_squared_error_is_that_of_the_dequantized_weight(spec: Spec) -> None:
    w = weights()
    found = quantize_rtn(w, spec)
    difference = w.astype(np.float64) - found.dequantize()
    expected = np.linalg.norm(difference) / np.linalg.norm(w.astype(np.float64))
    assert relative_error(w, found) == pytest.approx(expected, rel=1e-5)
    assert not squared_error(np.zeros_like(w), quantize_rtn(np.zeros_like(w), found.spec)).any()


@pytest.mark.parametrize("rows", [1, 16, 37])
@pytest.mark.parametrize("spec", [Spec(4, 32), Spec(6, 128), Spec(8, 64)], ids=str)
def test_bits_of_bfloat16_give_what_their_float32_gives(spec: Spec, rows: int) -> None:
    bits = (weights(rows).view(np.uint32) >> 16).astype(np.uint16)
    wide = (bits.astype(np.uint32) << 16).view(np.float32)
    expected = quantize_rtn(wide, spec)
    found, sums = round_symmetric(bits, spec)
    assert found.shape == (rows, 256)
    np.testing.assert_array_equal(found.codes, expected.codes)
    np.testing.assert_array_equal(found.scales, expected.scales)
    np.testing.assert_allclose(sums, squared_error(wide, expected), rtol=1e-6)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_weight_that_is_not_finite_shows_in_the_sums(bits: int, value: float) -> None:
    w = weights()
    w[30, 7] = value
    with np.errstate(invalid="ignore"):
        assert not np.isfinite(round_symmetric(w.view(np.int32), Spec(bits, 32))[1][1])
