"""Rows rounded together, against slow arithmetic in float64."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from uq.formats.spec import QuantTensor, Spec
from uq.quantize import two_sided
from uq.quantize.plan import GptqOptions
from uq.quantize.scales import quantize_rtn
from uq.quantize.two_sided import loss, refitted, round_together, swept

Array = NDArray[np.float32]
SPECS = [Spec(4, 32), Spec(4, 32, True), Spec(5, 64), Spec(4, 32, scale_bits=8)]
ROWS, COLS = 24, 128


def moments(n: int, seed: int) -> Array:
    """(n, n) of correlated channels of different sizes, its diagonal 1 in the mean."""
    rng = np.random.default_rng(seed)
    mixing = rng.standard_normal((n, n)) * np.exp(0.5 * rng.standard_normal(n))
    x = rng.standard_normal((20 * n, n)) @ mixing
    found = x.T @ x
    scaled: Array = (found / np.diagonal(found).mean()).astype(np.float32)
    return scaled


HESSIAN, OUTPUTS = moments(COLS, 1), moments(ROWS, 2)
TARGET = np.random.default_rng(3).standard_normal((ROWS, COLS)).astype(np.float32)


def exact_loss(tensor: QuantTensor) -> float:
    missed = TARGET.astype(np.float64) - tensor.dequantize()
    return float(np.trace(OUTPUTS.astype(np.float64) @ missed @ HESSIAN @ missed.T))


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_sweeps_end_where_no_single_code_can_be_moved(spec: Spec) -> None:
    found = quantize_rtn(TARGET, spec)
    losses = [exact_loss(found)]
    for _ in range(30):
        found = swept(TARGET, found, HESSIAN, OUTPUTS)
        losses.append(exact_loss(found))
    assert all(
        after <= before * (1 + 1e-6) for before, after in zip(losses, losses[1:], strict=False)
    )
    assert losses[-1] < 0.7 * losses[0]
    assert loss(TARGET, found, HESSIAN, OUTPUTS) == pytest.approx(losses[-1], rel=1e-4)
    for row, col in zip(range(ROWS), range(0, COLS, 5), strict=False):
        for step in (-1, 1):
            codes = found.codes.copy()
            codes[row, col] = np.clip(int(codes[row, col]) + step, spec.qmin, spec.qmax)
            moved = QuantTensor(codes, found.scales, spec, found.zeros)
            assert exact_loss(moved) >= losses[-1] * (1 - 1e-6)


def test_refitted_scales_solve_the_least_squares(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all rows and groups at once, by a dense solver in float64."""
    monkeypatch.setattr(two_sided, "STEPS", 300)
    spec = Spec(4, 32)
    start = quantize_rtn(TARGET, spec)
    found = refitted(TARGET, start, HESSIAN, OUTPUTS)
    groups = COLS // spec.group
    columns = np.zeros((ROWS, COLS, ROWS, groups))  # what a scale adds to the weights
    for row, group in np.ndindex(ROWS, groups):
        here = slice(group * spec.group, (group + 1) * spec.group)
        columns[row, here, row, group] = start.levels()[row, here]
    flat = columns.reshape(ROWS * COLS, -1)
    metric = np.kron(OUTPUTS.astype(np.float64), HESSIAN)
    best = np.linalg.solve(flat.T @ metric @ flat, flat.T @ metric @ TARGET.ravel())
    np.testing.assert_allclose(found.scales.ravel(), best, rtol=2e-3, atol=2e-4)
    assert exact_loss(found) < exact_loss(start)


def test_rounding_together_beats_rows_alone() -> None:
    spec = Spec(4, 32)
    alone = partial(quantize_rtn, spec=spec)

    def round_rows(target: NDArray[np.floating[Any]]) -> QuantTensor:
        return alone(target.astype(np.float32))

    options = GptqOptions(outputs=0.01)
    together = round_together(TARGET.astype(np.float64), HESSIAN, OUTPUTS, round_rows, options)
    assert exact_loss(together) < 0.6 * exact_loss(alone(TARGET))


def test_curvature_of_no_rank_leaves_rows_alone() -> None:
    alone = quantize_rtn(TARGET, Spec(4, 32))
    nothing = np.zeros((ROWS, ROWS), np.float32)
    found = round_together(TARGET, HESSIAN, nothing, lambda _: alone, GptqOptions(outputs=1.0))
    assert found is alone
