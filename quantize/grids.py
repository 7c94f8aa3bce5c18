"""The compiled search for the grid of each group: its scale, its zero point, the codes on it.

A candidate grid gives levels L (codes less the zero point). With the importance a of each input
channel, the scale S1 / S2 with S1 = sum(a w L), S2 = sum(a L^2) leaves the weighted error
sum(a w^2) - S1^2 / S2: the candidate with the largest S1^2 / S2 wins, and gets that scale. This is
how llama.cpp's quantization with an importance matrix searches (`make_qx_quants`).

The inner loops run over candidates, so that the sum over a group keeps its order whatever the
vector width. The kernels release the GIL and treat rows independently: callers may cut a matrix
into blocks of rows and run them in threads without changing a bit.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic
from numpy.typing import NDArray

from uq.formats.half import from_half, to_half
from uq.quantize.lanes import LANES, candidate_sums

CANDIDATES = 19  # of a symmetric grid, in the first lanes; the others repeat the last
SHIFTS = (0, -1, 1)  # of the zero point beside the one that fits the group's smallest weight
# A group below this in magnitude has no float16 scale and becomes zero.
TINY = np.float32(1e-30)


def symmetric_steps(qmin: int) -> NDArray[np.float32]:
    """What the group's largest weight is divided by its scale, in each lane: qmin and 11 % around.

    The largest weight may become `qmin`, which has no positive counterpart: scales have a sign.
    """
    lanes = np.minimum(np.arange(LANES), CANDIDATES - 1) - CANDIDATES // 2
    return (qmin * (1 + lanes / 80)).astype(np.float32)


def range_steps(span: int) -> NDArray[np.float32]:
    """What the group's range is divided by its scale, in each lane: `span`, -13.5 to +21 %."""
    return (span * (1 + (np.arange(LANES) - 9) * 0.015)).astype(np.float32)


@njit(nogil=True, cache=True)
def search_scales(
    weight: NDArray[np.float32],
    bits: NDArray[np.int32],
    importance: NDArray[np.float32],
    steps: NDArray[np.float32],
    qmin: int,
    qmax: int,
    codes: NDArray[np.int8],
    halves: NDArray[np.uint16],
) -> None:
    """Symmetric grids. Out: codes (rows, cols), bits of the float16 scales (rows, groups).

    Args:
        bits: `weight` seen as integers.
        steps: `symmetric_steps(qmin)`.
    """
    rows, groups = halves.shape
    group = weight.shape[1] // groups
    sums = np.empty(4 * LANES, np.float32)  # S1, S2, S1^2 / S2, steps
    sums[3 * LANES :] = steps
    for row in range(rows):
        w, raw, out = weight[row], bits[row], codes[row]  # per group, slices would be counted
        for g in range(groups):
            start, stop = g * group, (g + 1) * group
            largest = _largest(raw, start, stop)
            scale = np.float32(0)
            if abs(largest) > TINY:
                scale = _best_scale(w, importance, start, stop, largest, qmin, qmax, sums)
            halves[row, g] = to_half(scale)
            _round(w, start, stop, from_half(halves[row, g]), qmin, qmax, out)


@njit(nogil=True, cache=True)
def _best_scale(
    w: NDArray[np.float32],
    a: NDArray[np.float32],
    start: int,
    stop: int,
    largest: np.float32,
    qmin: int,
    qmax: int,
    sums: NDArray[np.float32],
) -> np.float32:
    """Scale of the best candidate; overwrites all but the steps."""
    inverse = np.float32(1) / largest
    candidate_sums(w, a, start, stop, inverse, np.float32(qmin), np.float32(qmax), sums)
    best = 0
    for k in range(1, CANDIDATES):
        best = k if sums[2 * LANES + k] > sums[2 * LANES + best] else best
    if not sums[LANES + best] > 0:
        return np.float32(0)
    scale: np.float32 = sums[best] / sums[LANES + best] * largest
    return scale


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
    sums = np.empty(4 * LANES, np.float32)  # S1, S2, steps, lowest levels
    sums[2 * LANES : 3 * LANES] = steps
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
        sums[: 2 * LANES] = 0
        for k in range(LANES):
            nibble = np.rint(least * inverse * sums[2 * LANES + k] / unit) + np.float32(shift)
            sums[3 * LANES + k] = unit * min(max(nibble, np.float32(-15)), np.float32(0))
        for i in range(len(w)):
            x = w[i] * inverse
            for k in range(LANES):
                bottom = sums[3 * LANES + k]
                level = min(max(np.rint(x * sums[2 * LANES + k]), bottom), bottom + width)
                weighted = a[i] * level
                sums[k] += weighted * x
                sums[LANES + k] += weighted * level
        for k in range(LANES):
            fit = sums[k] * sums[k] / sums[LANES + k] if sums[LANES + k] > 0 else np.float32(0)
            if fit > best:
                best, low = fit, sums[3 * LANES + k]
                scale = sums[k] / sums[LANES + k] * (most - least)
    return scale, low


@intrinsic
def _as_float(_typing: Any, bits: Any) -> Any:
    """Bits of a float32 as int32 -> that float32."""

    def codegen(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.int32), codegen


@njit(nogil=True, cache=True)
def _largest(bits: NDArray[np.int32], start: int, stop: int) -> np.float32:
    """The number of the largest magnitude in `start:stop`, the positive one of two.

    By integers: without their sign they order like the magnitudes, with it positive ones order like
    the numbers, and an integer maximum vectorizes where a float one may not.
    """
    magnitude = positive = np.int32(0)
    for i in range(start, stop):
        unsigned = np.int32(bits[i] & np.int32(0x7FFFFFFF))
        magnitude = unsigned if unsigned > magnitude else magnitude
        positive = bits[i] if bits[i] > positive else positive
    largest: np.float32 = _as_float(magnitude)
    return largest if positive == magnitude else -largest


@njit(nogil=True, cache=True)
def largest_values(
    weight: NDArray[np.float32],
    bits: NDArray[np.int32],
    codes: NDArray[np.int8],
    halves: NDArray[np.uint16],
) -> None:
    """INT8: the largest magnitude of each group becomes code 127. `bits` is as above."""
    rows, groups = halves.shape
    group = weight.shape[1] // groups
    for row in range(rows):
        w, raw, out = weight[row], bits[row], codes[row]
        for g in range(groups):
            start, stop = g * group, (g + 1) * group
            halves[row, g] = to_half(abs(_largest(raw, start, stop)) / np.float32(127))
            _round(w, start, stop, from_half(halves[row, g]), -127, 127, out)


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
