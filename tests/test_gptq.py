"""GPTQ against its textbook form, and what each of its parts buys."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from uq.formats.row_scales import split_scales
from uq.formats.spec import SPECS, QuantTensor, Spec
from uq.quantize.factor import (
    Factor,
    factorize,
    inverse_cholesky,
    left_variances,
    unusable,
)
from uq.quantize.gptq import Statistics, output_error, quantize_gptq, scale_importance
from uq.quantize.plan import GptqOptions, WorkSizes
from uq.quantize.refit import refit_scales
from uq.quantize.scales import quantize_rtn

Array = NDArray[Any]
PLAIN = GptqOptions(correction=0.0, residual=0.0, descents=0, refit=False)


def inputs(tokens: int = 1000, n: int = 256, seed: int = 0) -> Array:
    """(tokens, n) correlated inputs with channels of unequal size."""
    rng = np.random.default_rng(seed)
    mix = rng.standard_normal((n, n)) / n**0.5 + 0.5 * np.eye(n)
    out: Array = rng.standard_normal((tokens, n)) @ mix * np.exp(0.7 * rng.standard_normal(n))
    return out


def weights(rows: int = 24, n: int = 256, seed: int = 1) -> NDArray[np.float32]:
    return (0.05 * np.random.default_rng(seed).standard_normal((rows, n))).astype(np.float32)


def statistics(x: Array, x_float: Array | None = None) -> Statistics:
    cross = None if x_float is None else (x_float - x).T @ x / len(x)
    return Statistics(x.T @ x / len(x), cross)


def factor_of(hessian: Array, damping: float = 0.01) -> Factor:
    factor = factorize(hessian, damping)
    assert factor is not None
    return factor


def textbook(weight: Array, hessian: Array, grid: QuantTensor) -> NDArray[np.int8]:
    """Algorithm 1 of the paper without its blocks: the inverse Hessian is updated explicitly.

    After column c is rounded, the other weights move by the error times H^-1's column c over its
    diagonal entry, and c is eliminated from H^-1.
    """
    rows, n = weight.shape
    spec, scales = grid.spec, grid.scales.astype(np.float64)
    zeros = np.zeros(scales.shape) if grid.zeros is None else grid.zeros.astype(np.float64)
    w = weight.copy()
    inverse = np.linalg.inv(hessian + 0.01 * np.diagonal(hessian).mean() * np.eye(n))
    codes = np.zeros((rows, n), np.int8)
    for col in np.argsort(-np.diagonal(hessian), kind="stable"):
        scale, zero = scales[:, col // spec.group], zeros[:, col // spec.group]
        codes[:, col] = np.clip(np.rint(w[:, col] / scale) + zero, spec.qmin, spec.qmax)
        error = (w[:, col] - (codes[:, col] - zero) * scale) / inverse[col, col]
        w -= np.outer(error, inverse[col])
        inverse -= np.outer(inverse[:, col], inverse[col]) / inverse[col, col]
    return codes


@pytest.mark.parametrize(
    ("n", "spec"),
    [
        (256, Spec(4, 64)),
        (160, Spec(4, 32)),
        (384, Spec(4, 128)),
        (256, Spec(5, 32)),
        (256, Spec(6, 64)),
        (160, Spec(4, 32, True)),
        (256, Spec(6, 128, True)),
    ],
    ids=str,
)
def test_codes_equal_the_textbook(n: int, spec: Spec) -> None:
    w, moments = weights(n=n), statistics(inputs(n=n))
    found = quantize_gptq(w, spec, moments, factor_of(moments.hessian), PLAIN)
    expected = textbook(w.astype(np.float64), moments.hessian, found)
    np.testing.assert_array_equal(found.codes, expected)


@pytest.mark.parametrize("spec", [Spec(4, 64), Spec(5, 64, True)], ids=str)
def test_the_grid_is_that_of_the_weighted_search(spec: Spec) -> None:
    w, moments = weights(), statistics(inputs())
    factor = factor_of(moments.hessian)
    found = quantize_gptq(w, spec, moments, factor, PLAIN)
    searched = quantize_rtn(w, spec, scale_importance(moments, factor.left))
    np.testing.assert_array_equal(found.scales, searched.scales)
    assert found.zeros is None or searched.zeros is not None
    if found.zeros is not None:
        np.testing.assert_array_equal(found.zeros, searched.zeros)


def test_what_is_left_of_a_column_is_its_variance_given_those_behind_it() -> None:
    hessian = statistics(inputs(n=48)).hessian
    damped = hessian + 0.01 * np.diagonal(hessian).mean() * np.eye(48)
    order = np.argsort(-np.diagonal(hessian), kind="stable")
    expected = np.empty(48)
    for place, col in enumerate(order):
        behind = order[place + 1 :]
        known = np.linalg.solve(damped[np.ix_(behind, behind)], damped[behind, col])
        expected[col] = damped[col, col] - damped[col, behind] @ known
    np.testing.assert_allclose(factor_of(hessian).left, expected, rtol=1e-9)
    left = left_variances(hessian, 0.01)
    assert left is not None
    np.testing.assert_allclose(left, expected, rtol=1e-9)


@pytest.mark.parametrize("spec", [s for s in SPECS if s.group == 64], ids=str)
def test_gptq_beats_rounding_to_nearest(spec: Spec) -> None:
    w, moments = weights(), statistics(inputs())
    found = quantize_gptq(w, spec, moments, factor_of(moments.hessian), PLAIN)
    nearest = quantize_rtn(w, spec, moments.importance)
    error = output_error(w, found, moments.hessian)
    assert error < 0.85 * output_error(w, nearest, moments.hessian)


@pytest.mark.parametrize("spec", [Spec(4, 32), Spec(5, 64, True)], ids=str)
def test_scales_of_8_bits_cost_little(spec: Spec) -> None:
    """Codes are found on scales that can be stored, and refitted scales can be, too."""
    w, moments = weights(), statistics(inputs())
    factor, options = factor_of(moments.hessian), GptqOptions()
    exact = quantize_gptq(w, spec, moments, factor, options)
    found = quantize_gptq(w, replace(spec, scale_bits=8), moments, factor, options)
    split_scales(found.scales)  # they are multiples
    lost = output_error(w, found, moments.hessian) / output_error(w, exact, moments.hessian)
    assert lost < 1.03


def test_output_error_is_that_of_the_outputs() -> None:
    w, x = weights(), inputs()
    found = quantize_rtn(w, Spec(4, 64))
    y, y_found = x @ w.T, x @ found.dequantize().T
    expected = np.linalg.norm(y - y_found) / np.linalg.norm(y)
    assert output_error(w, found, statistics(x).hessian) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("spec", [Spec(4, 64), Spec(4, 64, True)], ids=str)
def test_refit_solves_the_least_squares_problem_of_each_row(spec: Spec) -> None:
    w, x = weights(rows=4), inputs()
    start = quantize_rtn(w, spec)
    hessian = x.T @ x / len(x)
    found = refit_scales(w.astype(np.float64), start.levels(), start.scales, hessian)
    for row in range(4):
        levels = start.codes[row].reshape(4, 64).astype(np.float64)
        if start.zeros is not None:
            levels -= start.zeros[row][:, None]
        basis = x @ (levels * np.eye(4)[:, :, None]).reshape(4, 256).T
        best, *_ = np.linalg.lstsq(basis, x @ w[row], rcond=None)
        # The ridge of 1e-3 and float16 keep it from being exact.
        np.testing.assert_allclose(found[row], best, rtol=5e-3)


@pytest.mark.parametrize("spec", [Spec(4, 64), Spec(6, 64, True)], ids=str)
def test_refit_lowers_the_output_error(spec: Spec) -> None:
    w, moments = weights(), statistics(inputs())
    factor = factor_of(moments.hessian)
    plain = quantize_gptq(w, spec, moments, factor, PLAIN)
    refitted = quantize_gptq(w, spec, moments, factor, GptqOptions(correction=0.0, descents=0))
    np.testing.assert_array_equal(plain.codes, refitted.codes)
    hessian = moments.hessian
    assert output_error(w, refitted, hessian) < output_error(w, plain, hessian)


def test_rows_without_codes_keep_their_zero_scales() -> None:
    w = weights()
    w[3] = 0
    moments = statistics(inputs())
    found = quantize_gptq(w, Spec(4, 64), moments, factor_of(moments.hessian), GptqOptions())
    assert not found.codes[3].any()
    assert not found.scales[3].any()


def test_correction_moves_outputs_towards_the_floating_point_path() -> None:
    w, x_float = weights(), inputs(tokens=4000)
    x = x_float * 0.97 + 0.05 * inputs(tokens=4000, seed=9)
    moments = statistics(x, x_float)
    factor = factor_of(moments.hessian)
    target = x_float @ w.T

    def miss(options: GptqOptions) -> float:
        found = quantize_gptq(w, Spec(8, 64), moments, factor, options)
        return float(np.linalg.norm(x @ found.dequantize().T - target))

    half, none = miss(GptqOptions(correction=0.5)), miss(GptqOptions(correction=0.0, descents=0))
    assert miss(GptqOptions(correction=1.0)) < half < none


@pytest.mark.parametrize("n", [1, 63, 64, 65, 200])
def test_inverse_cholesky_is_that_of_lapack(n: int) -> None:
    x = np.random.default_rng(n).standard_normal((2 * n, n))
    matrix = x.T @ x + np.eye(n)
    expected = np.linalg.inv(np.linalg.cholesky(matrix))
    inverse_cholesky(matrix)
    np.testing.assert_allclose(matrix, expected, atol=1e-12)


def test_blocks_of_rows_are_quantized_alike() -> None:
    x = inputs()
    moments = statistics(x, x * 1.01)
    factor, w = factor_of(moments.hessian), weights()
    whole = quantize_gptq(w, Spec(4, 64, True), moments, factor, GptqOptions())
    error = output_error(w, whole, moments.hessian)
    few = GptqOptions(work=WorkSizes(row_numbers=7 * 256))
    parts = quantize_gptq(w, Spec(4, 64, True), moments, factor, few)
    assert np.mean(parts.codes != whole.codes) < 1e-3  # products of other shapes round otherwise
    assert parts.zeros is not None and parts.zeros.shape == parts.scales.shape
    assert output_error(w, parts, moments.hessian) == pytest.approx(error, rel=1e-3)


def test_float32_matrices_quantize_as_well_as_float64() -> None:
    """Wide Hessians are kept and factorized in float32."""
    x = inputs(tokens=300)  # hardly more than channels: badly conditioned
    exact = statistics(x, x * 1.01)
    assert exact.cross is not None
    single = Statistics(exact.hessian.astype(np.float32), exact.cross.astype(np.float32))
    errors = []
    for moments in (exact, single):
        solver = moments.factorize(0.01)
        assert not isinstance(solver, str)
        found = solver.quantize(weights(), Spec(4, 64), GptqOptions())
        errors.append(output_error(weights(), found, exact.hessian))
    assert errors[1] == pytest.approx(errors[0], rel=2e-3)


def test_dead_channels_are_rounded_to_nearest() -> None:
    x = inputs()
    x[:, 64:128] = 0
    w, moments = weights(), statistics(x)
    found = quantize_gptq(w, Spec(4, 64), moments, factor_of(moments.hessian), PLAIN)
    nearest = quantize_rtn(w, Spec(4, 64), moments.importance)
    np.testing.assert_array_equal(found.codes[:, 64:128], nearest.codes[:, 64:128])


def test_damping_is_raised_until_the_hessian_is_positive_definite() -> None:
    hessian = np.eye(64)
    hessian[0, 1] = hessian[1, 0] = 1.05  # eigenvalue -0.05
    with pytest.raises(np.linalg.LinAlgError):
        inverse_cholesky(hessian + 0.01 * np.eye(64))
    upper = factor_of(hessian).upper
    expected = np.linalg.inv(hessian + 0.1 * np.eye(64))
    np.testing.assert_allclose(upper.T @ upper, expected, atol=1e-9)


@pytest.mark.parametrize("value", [np.nan, np.inf, 0.0])
def test_useless_statistics_have_no_factor(value: float) -> None:
    assert factorize(np.full((64, 64), value), 0.01) is None


def test_indefinite_beyond_all_damping_has_no_factor() -> None:
    hessian = np.eye(64)
    hessian[0, 1] = hessian[1, 0] = 3.0
    assert factorize(hessian, 0.01) is None


def test_result_is_a_whole_tensor() -> None:
    moments = statistics(inputs())
    factor = factor_of(moments.hessian)
    found = quantize_gptq(weights(), Spec(4, 64), moments, factor, GptqOptions())
    assert isinstance(found, QuantTensor)
    assert found.codes.dtype == np.int8 and found.codes.flags.c_contiguous
    assert found.scales.dtype == np.float16 and found.scales.shape == (24, 4)
    assert found.codes.min() >= -8 and found.codes.max() <= 7


@pytest.mark.parametrize(
    ("hessian", "reason"),
    [
        (np.full((40, 40), np.inf), "an input of the calibration is not finite"),
        (np.full((40, 40), np.nan), "an input of the calibration is not finite"),
        (np.zeros((40, 40)), "every input of the calibration is zero"),
        (np.ones((40, 40)) * 100 - np.eye(40) * 99 - 200 * np.eye(40)[::-1],
         "the Hessian of the calibration is not positive definite at any damping"),
    ],
)  # fmt: skip
def test_a_hessian_without_factor_says_why(hessian: Array, reason: str) -> None:
    assert factorize(hessian, 0.01) is None
    assert unusable(hessian) == reason


def test_channels_that_are_never_active_are_rounded_to_nearest() -> None:
    x = inputs(n=64)
    x[:, 32:] = 0
    found_statistics = statistics(x)
    factor = factorize(found_statistics.hessian, 0.01)
    assert factor is not None
    weight, spec = weights(n=64), Spec(4, 32)
    found = quantize_gptq(weight, spec, found_statistics, factor, PLAIN)
    nearest = quantize_rtn(weight, spec, found_statistics.importance)
    np.testing.assert_array_equal(found.codes[:, 32:], nearest.codes[:, 32:])
    assert (found.codes[:, :32] != nearest.codes[:, :32]).any()
