"""The kernels of calibration on a GPU against float64."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.vulkan_lab import no_messages  # noqa: F401
from uq.formats.spec import QuantTensor, Spec
from uq.kernels.vulkan.dense.cells import Cell, Levels
from uq.kernels.vulkan.dense.factor import inverse_cholesky
from uq.kernels.vulkan.dense.grids import Curvature, Quantizer
from uq.kernels.vulkan.dense.matrix import Matrix
from uq.kernels.vulkan.dense.products import Batch
from uq.kernels.vulkan.dense.workshop import Workshop
from uq.kernels.vulkan.device import choose
from uq.quantize.descent import SWEEPS, descend
from uq.quantize.factor import Factor, factorize
from uq.quantize.refit import REFIT_RIDGE, refit_scales
from uq.quantize.scales import quantize_rtn, relative_importance
from uq.quantize.vulkan_gptq import grid_kind

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
ROWS, N = 37, 160  # neither fills its last tile
TIE = 2e-3  # steps of the grid: codes may differ where the value is so close to a tie
UNIT = 0.25  # a weight of 1 on the device is one of 0.25


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workshop]:
    made = Workshop.open(choose(), tmp_path_factory.mktemp("pipelines"))
    yield made
    made.close()


def normal(*shape: int, seed: int = 0) -> Floats:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def moments(n: int) -> Floats:
    """Positive definite, its diagonal around 1, columns that depend on each other."""
    x = normal(3 * n, n) + normal(3 * n, 1, seed=1)
    return (x.T @ x / len(x) / 2 + 0.05 * np.eye(n)).astype(np.float32)


@pytest.mark.parametrize("b_by_k", [False, True])
@pytest.mark.parametrize("a_by_k", [False, True])
@pytest.mark.parametrize(("kind", "dtype"), [("f32", np.float32), ("f16", np.float16)])
def test_product(shop: Workshop, kind: str, dtype: type, a_by_k: bool, b_by_k: bool) -> None:
    a: NDArray[Any] = normal(130, 70).astype(dtype)
    b: NDArray[Any] = normal(50, 70, seed=1).astype(dtype)
    placed_a = shop.store.put(f"a {a_by_k} {kind}", a.T.copy() if a_by_k else a, kind)
    placed_b = shop.store.put(f"b {b_by_k} {kind}", b.T.copy() if b_by_k else b, kind)
    c = shop.store.put("c", np.ones((130, 50), np.float32))
    shop.products.multiply(c, placed_a, placed_b, alpha=0.5, add=True, a_by_k=a_by_k, b_by_k=b_by_k)
    exact = 1 + 0.5 * a.astype(np.float64) @ b.T.astype(np.float64)
    bound = 2e-6 * (1 + np.abs(a.astype(np.float64)) @ np.abs(b.T.astype(np.float64)))
    assert (np.abs(shop.store.get(c) - exact) <= bound).all()


def test_square_is_set_on_and_below_the_diagonal(shop: Workshop) -> None:
    x = normal(N, 200)
    c = shop.store.matrix("square", 200, 200)
    shop.products.square(c, shop.store.put("x", x), by_k=True)
    found, exact = shop.store.get(c), x.T.astype(np.float64) @ x
    bound = 2e-6 * (1 + np.abs(x.T) @ np.abs(x))
    below = np.tril_indices(200)
    assert (np.abs(found - exact) <= bound)[below].all()


def test_batches_share_an_operand(shop: Workshop) -> None:
    """Two outer and four inner products, two inner ones with the same B."""
    a, b = normal(2 * 4 * 128, 128), normal(2 * 2 * 128, 128, seed=1)
    c = shop.store.matrix("batched", 8 * 128, 128)
    size = 128 * 128
    batch = Batch(2, 4, 2, (4 * size, size), (2 * size, size), (4 * size, size))
    parts = [shop.store.put(name, x).block(0, 0, 128, 128) for name, x in (("a4", a), ("b2", b))]
    shop.products.multiply(c.block(0, 0, 128, 128), *parts, batch=batch)
    left, right = a.reshape(2, 4, 128, 128), b.reshape(2, 2, 128, 128).repeat(2, axis=1)
    exact = np.einsum("oimk,oink->oimn", left, right, dtype=np.float64)
    np.testing.assert_allclose(shop.store.get(c).reshape(exact.shape), exact, rtol=0, atol=2e-4)


@pytest.mark.parametrize("group", [32, 64, 128])
def test_systems(shop: Workshop, group: int) -> None:
    levels = np.random.default_rng(0).integers(-8, 8, (ROWS, 256)).astype(np.float16)
    hessian, groups = moments(256), 256 // group
    placed = shop.store.put("levels16", levels, "f16")
    result = shop.store.span("some systems", 4 * placed.height * groups**2)
    shop.products.systems(result, placed, shop.store.put("h", hessian), group)
    found = shop.store.numbers(result, ROWS * groups**2).reshape(ROWS, groups, groups)
    parts = levels.astype(np.float64).reshape(ROWS, groups, group)
    h = hessian.astype(np.float64).reshape(groups, group, groups, group)
    exact = np.einsum("rgi,gihj,rhj->rgh", parts, h, parts, optimize=True)
    np.testing.assert_allclose(found, exact, rtol=0, atol=2e-6 * np.abs(exact).max())


def test_inverse_of_a_cholesky_factor(shop: Workshop) -> None:
    whole = np.eye(256, dtype=np.float32)
    whole[:N, :N] = moments(N)
    matrix, inverse = shop.store.put("m", whole), shop.store.matrix("i", 256, 256)
    shop.stream.clear(inverse.span)
    failed = shop.store.vector("failed", np.zeros(1, np.uint32))
    inverse_cholesky(shop.stream, shop.products, matrix, inverse, failed)
    exact = np.linalg.inv(np.linalg.cholesky(whole.astype(np.float64)))
    np.testing.assert_allclose(shop.store.get(inverse), exact, rtol=0, atol=2e-5)
    assert shop.store.numbers(failed, 1).view(np.uint32)[0] == 0


@pytest.mark.parametrize("broken", [-1.0, np.nan])
def test_a_matrix_that_is_not_positive_definite(shop: Workshop, broken: float) -> None:
    whole = np.eye(128, dtype=np.float32)
    whole[100, 100] = broken
    matrix, inverse = shop.store.put("m", whole), shop.store.matrix("i", 128, 128)
    failed = shop.store.vector("failed", np.zeros(1, np.uint32))
    inverse_cholesky(shop.stream, shop.products, matrix, inverse, failed)
    assert shop.store.numbers(failed, 1).view(np.uint32)[0] == 1


@pytest.mark.parametrize(
    "spec", [Spec(4, 32), Spec(6, 32), Spec(4, 32, True), Spec(5, 32, True), Spec(8, 32)], ids=str
)
def test_searched_grids_are_those_of_main_memory(shop: Workshop, spec: Spec) -> None:
    weight = normal(ROWS, N) * np.float32(1e-3)
    weight[0, :32], weight[1] = 0, weight[1] * 1e-4  # no scale, a scale that is subnormal
    importance = relative_importance(np.square(normal(N, seed=2)), N)
    expected = quantize_rtn(weight, spec, importance)
    grid = searched(shop, weight, spec, importance)
    scales = stored(shop, grid) * np.float32(UNIT)
    same = scales == expected.scales.astype(np.float32)
    assert same.mean() > 0.98  # the rest: a division that is rounded otherwise
    np.testing.assert_allclose(scales, expected.scales, rtol=0.05)
    if expected.zeros is not None:
        lows = shop.store.numbers(grid.lows, ROWS * grid.groups).reshape(ROWS, -1)
        assert (spec.qmin - lows[:, : N // 32] == expected.zeros)[same].all()


def searched(shop: Workshop, weight: Floats, spec: Spec, importance: Floats) -> Levels:
    target = shop.store.put("target", weight / np.float32(UNIT))
    return Quantizer(*shop.tools).search(target, grid_kind(spec), importance, UNIT)


def stored(shop: Workshop, grid: Levels) -> Floats:
    """(rows, groups) scales on the device."""
    found = shop.store.numbers(grid.scales, ROWS * grid.groups).reshape(ROWS, -1)
    return found[:, : N // grid.group]


def curvature(shop: Workshop, hessian: Floats, factor: Factor) -> Curvature:
    places = np.empty(N, np.uint32)
    places[factor.order] = np.arange(N, dtype=np.uint32)
    upper = np.eye(256, dtype=np.float32)
    upper[:N, :N] = factor.upper
    return Curvature(
        shop.store.put("hessian", hessian),
        shop.store.put("diagonal", np.diagonal(hessian)[None].copy()),
        shop.store.put("upper", upper),
        shop.store.vector("order", factor.order.astype(np.uint32)),
        shop.store.vector("places", places),
    )


def rounded(shop: Workshop) -> tuple[Floats, Floats, Levels, Curvature, Factor]:
    """A weight behind GPTQ on the device: weight, Hessian, what was found, curvature, factor."""
    weight, hessian = normal(ROWS, N) * np.float32(0.02), moments(N)
    factor = factorize(hessian.astype(np.float64), 0.05)
    assert factor is not None
    grid = searched(shop, weight, Spec(4, 32), np.ones(N, np.float32))
    found = curvature(shop, hessian, factor)
    target = shop.store.matrix("target", ROWS, N)
    by_place = shop.store.matrix("by place", ROWS, N)
    shop.cells.run(Cell.GATHER, by_place, target, index=found.order)
    Quantizer(*shop.tools).round(by_place, grid, found)
    return weight, hessian, grid, found, factor


def tensor(shop: Workshop, grid: Levels) -> QuantTensor:
    scales = (stored(shop, grid) * np.float32(UNIT)).astype(np.float16)
    return QuantTensor(shop.store.get(grid.levels).copy(), scales, Spec(4, 32))


def test_each_code_is_the_nearest_given_those_before_it(shop: Workshop) -> None:
    weight, _, grid, _, factor = rounded(shop)
    found = tensor(shop, grid)
    codes = found.codes[:, factor.order].astype(np.float64)
    scales = found.scales.astype(np.float64).repeat(32, axis=1)[:, factor.order]
    left = weight.astype(np.float64)[:, factor.order]
    for place in range(N):
        wish = np.clip(left[:, place] / scales[:, place], -8, 7)
        assert (np.abs(codes[:, place] - wish) <= 0.5 + TIE).all()
        error = (left[:, place] - codes[:, place] * scales[:, place]) / factor.upper[place, place]
        left -= np.outer(error, factor.upper[place])


def test_descent_finds_what_main_memory_finds(shop: Workshop) -> None:
    weight, hessian, grid, found, _ = rounded(shop)
    before = tensor(shop, grid)
    added = 0.05 * float(np.diagonal(hessian).mean())
    damped = hessian + added * np.eye(N)
    expected = descend(weight.astype(np.float64), before, damped)
    target = shop.store.matrix("target", ROWS, N)
    Quantizer(*shop.tools).descend(target, grid, found, added, SWEEPS)
    after = tensor(shop, grid)
    assert (after.codes != before.codes).mean() > 0.005
    assert (after.codes == expected).mean() > 0.995
    one, two = (
        energy(weight, replace(before, codes=codes), damped) for codes in (after.codes, expected)
    )
    assert one == pytest.approx(two, rel=1e-4)
    np.testing.assert_array_equal(shop.store.get(found.hessian), hessian)  # damped no more


def energy(weight: Floats, found: QuantTensor, hessian: Doubles) -> float:
    error = weight.astype(np.float64) - found.dequantize()
    return float(np.vdot(error @ hessian, error))


def test_refitted_scales_are_those_of_float64(shop: Workshop) -> None:
    weight, hessian, grid, found, _ = rounded(shop)
    before = tensor(shop, grid)
    expected = refit_scales(
        weight.astype(np.float64), before.codes, before.scales, hessian.astype(np.float64)
    )
    outputs = shop.store.matrix("outputs", ROWS, N)
    target = shop.store.matrix("target", ROWS, N)
    shop.products.multiply(outputs, target, found.hessian)
    Quantizer(*shop.tools).refit(outputs, grid, found, REFIT_RIDGE, UNIT)
    after = tensor(shop, grid).scales
    assert (after != before.scales).mean() > 0.5
    np.testing.assert_allclose(after, expected, rtol=2e-3)  # two steps of float16


@pytest.mark.parametrize("kind", ["f32", "f16", "i8"])
def test_what_is_put_comes_back(shop: Workshop, kind: str) -> None:
    dtype = {"f32": np.float32, "f16": np.float16, "i8": np.int8}[kind]
    values = np.arange(3 * 130).reshape(3, 130).astype(dtype)
    matrix: Matrix = shop.store.put(f"kept {kind}", values, kind)
    np.testing.assert_array_equal(shop.store.get(matrix), values)
