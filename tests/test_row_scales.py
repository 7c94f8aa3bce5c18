"""Scales of 8 bits: exact products, the nearest ones, one way to write them."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from numpy.typing import NDArray

from uq.formats.layouts import LAYOUTS
from uq.formats.row_scales import MOST, join_scales, round_scales, row_steps, split_scales
from uq.formats.spec import SPECS, Spec
from uq.quantize.scales import quantize_rtn, squared_error

Halves = NDArray[np.float16]
SIZES = [2.0**e for e in (-30, -24, -20, -14, 0, 9)]  # zeros, subnormal numbers, the largest


def random_scales(size: float, rows: int = 40, groups: int = 20) -> Halves:
    rng = np.random.default_rng(1)
    return (rng.standard_normal((rows, groups)) * size).astype(np.float16)


@pytest.mark.parametrize("size", SIZES)
def test_every_product_is_exactly_a_float16(size: float) -> None:
    steps, _ = split_scales(round_scales(random_scales(size)))
    multiples = np.arange(-MOST, MOST + 1, dtype=np.int8)
    found = join_scales(steps[:, None], multiples)
    for step, row in zip(steps, found, strict=True):
        if step * np.float32(MOST) < 65504:
            exact = [Fraction(float(step)) * int(m) for m in multiples]
            assert [Fraction(float(scale)) for scale in row] == exact


@pytest.mark.parametrize("size", SIZES)
def test_stored_scales_come_back(size: float) -> None:
    scales = round_scales(random_scales(size))
    steps, multiples = split_scales(scales)
    np.testing.assert_array_equal(join_scales(steps[:, None], multiples), scales)
    assert all(bin(int(float(step) * 2**24)).rstrip("0").count("") <= 8 for step in steps)


def test_the_step_is_the_smallest_that_reaches_the_largest_scale() -> None:
    """All steps of four bits, tried one by one."""
    every = np.array(sorted({m * 2.0**e for m in range(1, 16) for e in range(-24, 12)}))
    largest = np.abs(random_scales(1.0)).max(axis=1)
    expected = [every[every * MOST >= one][0] for one in largest.astype(np.float64)]
    np.testing.assert_array_equal(row_steps(largest), expected)


def test_rounded_scales_are_the_nearest_multiples() -> None:
    scales = random_scales(1.0)
    steps = row_steps(np.abs(scales).max(axis=1))[:, None]
    error = np.abs(round_scales(scales).astype(np.float64) - scales)
    assert (error <= steps / 2).all()
    assert (error > steps / 4).any()


def test_what_is_stored_is_rounded_no_more() -> None:
    scales = round_scales(random_scales(1.0))
    np.testing.assert_array_equal(round_scales(scales), scales)


def test_rows_of_zeros_and_of_one_number() -> None:
    scales = np.array([[0, 0], [0, -3], [5, 5]], np.float16)
    steps, multiples = split_scales(scales)
    np.testing.assert_array_equal(steps, [0, 3, 5])
    np.testing.assert_array_equal(multiples, [[0, 0], [0, -1], [1, 1]])


def test_scales_that_are_no_multiples_are_refused() -> None:
    with pytest.raises(ValueError, match="no multiples up to 127 of one step"):
        split_scales(np.array([[1, 1.001]], np.float16))
    with pytest.raises(ValueError, match="not finite"):
        split_scales(np.array([[1, np.inf]], np.float16))


def test_a_row_that_is_not_finite_stays_so() -> None:
    scales = round_scales(np.array([[1, np.inf], [1, 2], [np.nan, 1]], np.float16))
    np.testing.assert_array_equal(np.isfinite(scales).all(axis=1), [False, True, False])


@pytest.mark.parametrize("name", LAYOUTS)
def test_noise_in_the_place_of_steps_is_read_without_a_warning(name: str) -> None:
    """Scales are not checked when a bundle is opened, so every byte must mean something."""
    spec, layout = Spec(4, 32, scale_bits=8), LAYOUTS[name]
    noise = np.random.default_rng(2).bytes(layout.nbytes(64, 256, spec))
    found = layout.untile(np.frombuffer(noise, np.uint8), (64, 256), spec)
    assert found.scales.dtype == np.float16
    assert not np.isfinite(found.scales).all()


@pytest.mark.parametrize("spec", [s for s in SPECS if s.group == 64], ids=str)
def test_codes_are_nearest_and_little_is_lost(spec: Spec) -> None:
    weight = np.random.default_rng(3).standard_normal((32, 1024)).astype(np.float32)
    exact, found = quantize_rtn(weight, spec), quantize_rtn(weight, replace(spec, scale_bits=8))
    split_scales(found.scales)  # they are multiples
    levels = weight / found.scales.astype(np.float32).repeat(64, axis=1)
    zeros = 0 if found.zeros is None else found.zeros.repeat(64, axis=1)
    assert (np.abs(levels + zeros - found.codes)[np.abs(found.codes) < spec.qmax] <= 0.501).all()
    lost = squared_error(weight, found)[0] / squared_error(weight, exact)[0]
    assert 1 <= lost < (1.005 if spec.bits < 6 else 1.04)
