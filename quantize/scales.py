"""Choice of scales, and rounding to the grid they span.

INT4 scales come from a search weighted by the importance of each input channel, the way llama.cpp's
quantization with an importance matrix does it (`make_qx_quants`), INT8 scales from the largest
value of the group. Scales are rounded to float16 before any code is computed, so that the codes fit
the scales that are stored.

The kernels release the GIL and treat rows independently: callers may cut a matrix into blocks of
rows and run them in threads without changing a bit.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic
from numpy.typing import NDArray

from uq.errors import CheckpointError
from uq.formats.half import from_half, to_half
from uq.formats.spec import QuantTensor, Spec

CANDIDATES = 19
# The inner loop runs over candidates, so that the sum over a group keeps its order whatever the
# vector width; three vectors of eight hold the 19 candidates.
LANES = 24
# The group's largest value M is tried at -(8 + k/10), k = -9..9; unused lanes repeat the last.
STEPS = np.array(
    [-(8 + 0.1 * (min(lane, CANDIDATES - 1) - CANDIDATES // 2)) for lane in range(LANES)],
    np.float32,
)
# A group below this in magnitude has no float16 scale and becomes zero.
TINY = np.float32(1e-30)
IMPORTANCE_FLOOR = 1e-6


def quantize_rtn(
    weight: NDArray[np.float32], spec: Spec, importance: NDArray[np.float32] | None = None
) -> QuantTensor:
    """Round a weight to nearest, on the best scales that its groups alone allow.

    Args:
        weight: (rows, cols) float32, finite.
        spec: its group divides cols.
        importance: (cols,) float32, relative mean square of each input channel; equal when None.
            INT8 does not use it.
    """
    rows, cols = weight.shape
    codes = np.empty((rows, cols), np.int8)
    halves = np.empty((rows, cols // spec.group), np.uint16)
    weight = np.ascontiguousarray(weight)
    if spec.bits == 8:
        _absmax(weight, weight.view(np.int32), spec.group, codes, halves)
    else:
        _search(weight, _relative(importance, cols), STEPS, spec.group, codes, halves)
    return QuantTensor(codes, halves.view(np.float16), spec)


def squared_error(weight: NDArray[np.float32], quantized: QuantTensor) -> NDArray[np.float64]:
    """Sum of the squared weight errors, and of the squared weights: (2,) float64."""
    error, energy = _squares(weight, quantized.codes, quantized.scales.astype(np.float32))
    return np.array([error, energy])


def weight_error(weight: NDArray[np.float32], quantized: QuantTensor) -> float:
    """Frobenius norm of the error over that of the weight; 0 for a weight of zeros."""
    return error_ratio(squared_error(weight, quantized))


def error_ratio(squares: NDArray[np.float64]) -> float:
    """Root of the quotient of the two sums of `squared_error`."""
    return float(np.sqrt(squares[0] / squares[1])) if squares[1] > 0 else 0.0


def checked(name: str, tensor: QuantTensor) -> QuantTensor:
    """The tensor itself.

    Raises:
        CheckpointError: a scale is beyond float16.
    """
    if not np.isfinite(tensor.scales).all():
        raise CheckpointError(
            f"{name}: weights are too large for float16 scales (over 65504 * {-tensor.spec.qmin}); "
            "the checkpoint is broken"
        )
    return tensor


def _relative(importance: NDArray[np.float32] | None, cols: int) -> NDArray[np.float32]:
    """Importance with mean 1 and no zero: a group of unused channels still gets a fitting scale."""
    if importance is None or not importance.any():
        return np.ones(cols, np.float32)
    relative: NDArray[np.float32] = importance / importance.mean()
    return np.maximum(relative, np.float32(IMPORTANCE_FLOOR), out=relative)


@intrinsic
def _as_float(_typing: Any, bits: Any) -> Any:
    """Bits of a float32 as int32 -> that float32."""

    def codegen(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.int32), codegen


@njit(nogil=True, cache=True)
def _search(
    weight: NDArray[np.float32],
    importance: NDArray[np.float32],
    steps: NDArray[np.float32],
    group: int,
    codes: NDArray[np.int8],
    halves: NDArray[np.uint16],
) -> None:
    """INT4: of 19 candidate roundings of each group, the one that the best scale fits best.

    For candidate codes L and importance a, the scale S1 / S2 with S1 = sum(a w L), S2 = sum(a L^2)
    leaves the weighted error sum(a w^2) - S1^2 / S2: the candidate with the largest S1^2 / S2 wins.
    """
    rows, groups = halves.shape
    sums = np.empty(3 * LANES, np.float32)  # S1, S2, steps: one array, so that they cannot alias
    sums[2 * LANES :] = steps
    for row in range(rows):
        for g in range(groups):
            here = slice(g * group, (g + 1) * group)
            w, a = weight[row, here], importance[here]
            largest = np.float32(0)
            for i in range(group):
                largest = w[i] if abs(w[i]) > abs(largest) else largest
            scale = _best_scale(w, a, largest, sums) if abs(largest) > TINY else np.float32(0)
            halves[row, g] = to_half(scale)
            _round(w, from_half(halves[row, g]), -8, 7, codes[row, here])


@njit(nogil=True, cache=True)
def _best_scale(
    w: NDArray[np.float32],
    a: NDArray[np.float32],
    largest: np.float32,
    sums: NDArray[np.float32],
) -> np.float32:
    """Scale of the candidate codes with the largest S1^2 / S2; overwrites S1 and S2."""
    sums[: 2 * LANES] = 0
    inverse = np.float32(1) / largest
    for i in range(len(w)):
        x = w[i] * inverse
        for k in range(LANES):
            code = np.rint(x * sums[2 * LANES + k])
            code = min(max(code, np.float32(-8)), np.float32(7))
            weighted = a[i] * code
            sums[k] += weighted * x
            sums[LANES + k] += weighted * code
    best, scale = np.float32(-1), np.float32(0)
    for k in range(CANDIDATES):
        fit = sums[k] * sums[k] / sums[LANES + k]
        if fit > best:
            best, scale = fit, sums[k] / sums[LANES + k] * largest
    return scale


@njit(nogil=True, cache=True)
def _absmax(
    weight: NDArray[np.float32],
    bits: NDArray[np.int32],
    group: int,
    codes: NDArray[np.int8],
    halves: NDArray[np.uint16],
) -> None:
    """INT8: the largest magnitude of each group becomes code 127.

    `bits` is `weight` seen as integers: without their sign they order like the magnitudes, and an
    integer maximum vectorizes where a float one may not.
    """
    rows, groups = halves.shape
    for row in range(rows):
        for g in range(groups):
            here = slice(g * group, (g + 1) * group)
            raw = bits[row, here]
            largest = np.int32(0)
            for i in range(group):
                magnitude = np.int32(raw[i] & np.int32(0x7FFFFFFF))
                largest = magnitude if magnitude > largest else largest
            halves[row, g] = to_half(_as_float(largest) / np.float32(127))
            _round(weight[row, here], from_half(halves[row, g]), -127, 127, codes[row, here])


@njit(nogil=True, cache=True)
def _round(
    weight: NDArray[np.float32],
    scale: np.float32,
    qmin: int,
    qmax: int,
    codes: NDArray[np.int8],
) -> None:
    """Nearest codes of one group, ties to even; all zero when the scale is zero in float16."""
    if scale == 0:
        codes[:] = 0
        return
    low, high = np.float32(qmin), np.float32(qmax)
    for i in range(len(codes)):
        codes[i] = np.int8(np.int32(min(max(np.rint(weight[i] / scale), low), high)))


@njit(nogil=True, cache=True)
def _squares(
    weight: NDArray[np.float32], codes: NDArray[np.int8], scales: NDArray[np.float32]
) -> tuple[float, float]:
    """Sums of (w - code * scale)^2 and of w^2, in float64; one sum per place in a group."""
    rows, groups = scales.shape
    group = weight.shape[1] // groups
    errors, energies = np.zeros(group), np.zeros(group)
    for row in range(rows):
        for g in range(groups):
            w = weight[row, g * group : (g + 1) * group]
            code = codes[row, g * group : (g + 1) * group]
            for i in range(group):
                error = w[i] - np.float32(code[i]) * scales[row, g]
                errors[i] += error * error
                energies[i] += w[i] * w[i]
    return errors.sum(), energies.sum()
