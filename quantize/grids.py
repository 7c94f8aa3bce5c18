"""The compiled search for the grid of each group: its scale, its zero point, the codes on it.

A candidate grid gives levels L (codes less the zero point). With the importance a of each input
channel, the scale S1 / S2 with S1 = sum(a w L), S2 = sum(a L^2) leaves the weighted error
sum(a w^2) - S1^2 / S2: the candidate with the largest S1^2 / S2 wins, and gets that scale. This is
how llama.cpp's quantization with an importance matrix searches (`make_qx_quants`).

The sum over a group keeps its order whatever the vector width: symmetric grids are searched in 16
rows at a time (`lanes`), the others with inner loops over candidates. The kernels release the GIL
and treat rows independently: callers may cut a matrix into blocks of rows and run them in threads
without changing a bit.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

from uq.formats.half import from_half, to_half
from uq.quantize.lanes import (
    CANDIDATES,
    LANES,
    best_scales,
    largest_lanes,
    round_lanes,
    rows_to_lanes,
)

STEPS = 24  # that are passed: those of a symmetric grid, the last one repeated, or of a range
SHIFTS = (0, -1, 1)  # of the zero point beside the one that fits the group's smallest weight
# A group below this in magnitude has no float16 scale and becomes zero.
TINY = np.float32(1e-30)


def symmetric_steps(qmin: int) -> NDArray[np.float32]:
    """(STEPS,) what the group's largest weight is divided by its scale: qmin and 11 % around.

    The largest weight may become `qmin`, which has no positive counterpart: scales have a sign.
    """
    places = np.minimum(np.arange(STEPS), CANDIDATES - 1) - CANDIDATES // 2
    return (qmin * (1 + places / 80)).astype(np.float32)


def range_steps(span: int) -> NDArray[np.float32]:
    """(STEPS,) what the group's range is divided by its scale: `span`, -13.5 to +21 %."""
    return (span * (1 + (np.arange(STEPS) - 9) * 0.015)).astype(np.float32)


@njit(nogil=True, cache=True)
def search_scales(
    bits: NDArray[np.int32] | NDArray[np.uint16],
    importance: NDArray[np.float32],
    steps: NDArray[np.float32],
    qmin: int,
    qmax: int,
    codes: NDArray[np.int8],
    halves: NDArray[np.uint16],
) -> tuple[float, float]:
    """Symmetric grids. Out: codes (rows, cols), bits of the float16 scales (rows, groups).

    Args:
        bits: (rows, cols) weights as bits, of float32, or of bfloat16 in uint16; C order, rows a
            multiple of `LANES`.
        steps: `symmetric_steps(qmin)`; none for INT8, whose largest magnitude becomes code `qmax`.

    Returns:
        Sums of the squared errors and of the squared weights; not finite if a weight is not.
    """
    rows, groups = halves.shape
    group = bits.shape[1] // groups
    low, high = np.float32(qmin), np.float32(qmax)
    w, x = np.empty((group, LANES), np.float32), np.empty((group, LANES), np.float32)
    largest, scales = np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    raw, sums = w.view(np.int32), np.zeros((2, LANES))
    for row in range(0, rows, LANES):
        for g in range(groups):
            start = g * group
            rows_to_lanes(bits, row, start, group, raw)
            largest_lanes(w, group, largest)
            if len(steps):
                a = importance[start : start + group]
                best_scales(w, a, group, steps, low, high, largest, TINY, x, scales)
            else:
                for lane in range(LANES):
                    scales[lane] = abs(largest[lane]) / high
            for lane in range(LANES):
                halves[row + lane, g] = to_half(scales[lane])
                scales[lane] = from_half(halves[row + lane, g])
            round_lanes(w, group, scales, low, high, codes, row, start, sums)
    return sums[0].sum(), sums[1].sum()


@njit(nogil=True, cache=True)
def search_zeros(
    weight: NDArray[np.float32],
    importance: NDArray[np.float32],
    steps: NDArray[np.float32],
    qmin: int,
    qmax: int,
    zero_step: int,
    codes: NDArray[np.int8],
    halves: NDArray[np.uint16],
    zeros: NDArray[np.int8],
) -> None:
    """Grids with zero points, which lie `zero_step` apart. Out: as above, and zeros (rows, groups).

    Args:
        steps: `range_steps(qmax - qmin)`.
    """
    rows, groups = halves.shape
    group = weight.shape[1] // groups
    sums = np.empty(4 * STEPS, np.float32)  # S1, S2, steps, lowest levels
    sums[2 * STEPS : 3 * STEPS] = steps
    for row in range(rows):
        for g in range(groups):
            here = slice(g * group, (g + 1) * group)
            w, a = weight[row, here], importance[here]
            least, most = np.float32(0), np.float32(0)
            for i in range(group):
                least, most = min(least, w[i]), max(most, w[i])
            scale, low = np.float32(0), np.float32(qmin)
            if most - least > TINY:
                scale, low = _best_grid(w, a, least, most, qmax - qmin, zero_step, sums)
            halves[row, g] = to_half(scale)
            scale = from_half(halves[row, g])
            low = np.float32(qmin) if scale == 0 else low
            zeros[row, g] = np.int8(np.int32(qmin - low))
            start, stop = g * group, (g + 1) * group
            _round(weight[row], start, stop, scale, int(low), int(low) + qmax - qmin, codes[row])
            for i in range(g * group, (g + 1) * group):
                codes[row, i] += zeros[row, g]


@njit(nogil=True, cache=True)
def _best_grid(
    w: NDArray[np.float32],
    a: NDArray[np.float32],
    least: np.float32,
    most: np.float32,
    span: int,
    zero_step: int,
    sums: NDArray[np.float32],
) -> tuple[np.float32, np.float32]:
    """Scale and lowest level of the best candidate; overwrites S1, S2 and lowest levels."""
    inverse = np.float32(1) / (most - least)
    unit, width = np.float32(zero_step), np.float32(span)
    best, scale, low = np.float32(-1), np.float32(0), np.float32(0)
    for shift in SHIFTS:
        sums[: 2 * STEPS] = 0
        for k in range(STEPS):
            nibble = np.rint(least * inverse * sums[2 * STEPS + k] / unit) + np.float32(shift)
            sums[3 * STEPS + k] = unit * min(max(nibble, np.float32(-15)), np.float32(0))
        for i in range(len(w)):
            x = w[i] * inverse
            for k in range(STEPS):
                bottom = sums[3 * STEPS + k]
                level = min(max(np.rint(x * sums[2 * STEPS + k]), bottom), bottom + width)
                weighted = a[i] * level
                sums[k] += weighted * x
                sums[STEPS + k] += weighted * level
        for k in range(STEPS):
            fit = sums[k] * sums[k] / sums[STEPS + k] if sums[STEPS + k] > 0 else np.float32(0)
            if fit > best:
                best, low = fit, sums[3 * STEPS + k]
                scale = sums[k] / sums[STEPS + k] * (most - least)
    return scale, low


@njit(nogil=True, cache=True)
def _round(
    weight: NDArray[np.float32],
    start: int,
    stop: int,
    scale: np.float32,
    qmin: int,
    qmax: int,
    codes: NDArray[np.int8],
) -> None:
    """Nearest levels of `start:stop`, ties to even; all zero when the scale is zero in float16."""
    if scale == 0:
        codes[start:stop] = 0
        return
    low, high = np.float32(qmin), np.float32(qmax)
    for i in range(start, stop):
        codes[i] = np.int8(np.int32(min(max(np.rint(weight[i] / scale), low), high)))


@njit(nogil=True, cache=True)
def round_levels(
    weight: NDArray[np.float32],
    scales: NDArray[np.float32],
    zeros: NDArray[np.int8],
    qmin: int,
    qmax: int,
    codes: NDArray[np.int8],
) -> None:
    """Nearest codes on given scales and zero points, (rows, groups) each. Out: codes."""
    rows, groups = scales.shape
    group = weight.shape[1] // groups
    for row in range(rows):
        for g in range(groups):
            start, stop, zero = g * group, (g + 1) * group, zeros[row, g]
            _round(weight[row], start, stop, scales[row, g], qmin - zero, qmax - zero, codes[row])
            for i in range(start, stop):
                codes[row, i] += zero


@njit(nogil=True, cache=True)
def squares(
    weight: NDArray[np.float32], levels: NDArray[np.int8], scales: NDArray[np.float32]
) -> tuple[float, float]:
    """Sums of (w - level * scale)^2 and of w^2, in float64; one sum per place in a group."""
    rows, groups = scales.shape
    group = weight.shape[1] // groups
    errors, energies = np.zeros(group), np.zeros(group)
    for row in range(rows):
        for g in range(groups):
            w = weight[row, g * group : (g + 1) * group]
            level = levels[row, g * group : (g + 1) * group]
            for i in range(group):
                error = w[i] - np.float32(level[i]) * scales[row, g]
                errors[i] += error * error
                energies[i] += w[i] * w[i]
    return errors.sum(), energies.sum()
