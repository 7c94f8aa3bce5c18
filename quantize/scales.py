"""Choice of scales and zero points, and rounding to the grid they span.

The grids of INT4, INT5 and INT6 come from a search weighted by the importance of each input
channel (`grids`), INT8 scales from the largest value of the group. Scales are rounded to what is
stored before any code is computed: to float16, or to multiples of a step of their row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from uq.errors import CheckpointError
from uq.formats.row_scales import round_scales
from uq.formats.spec import QuantTensor, Spec
from uq.quantize.grids import (
    range_steps,
    round_levels,
    search_scales,
    search_zeros,
    squares,
    symmetric_steps,
)
from uq.quantize.lanes import LANES

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
    weight = np.ascontiguousarray(weight)
    if spec.row_step:
        return _on_row_steps(weight, quantize_rtn(weight, spec.expanded, importance), spec)
    if not spec.zero_point:
        return round_symmetric(weight.view(np.int32), spec, importance)[0]
    codes, halves = _empty(weight.shape, spec)
    zeros, low, high = np.empty(halves.shape, np.int8), spec.qmin, spec.qmax
    a, steps = relative_importance(importance, weight.shape[1]), range_steps(high - low)
    search_zeros(weight, a, steps, low, high, spec.zero_step, codes, halves, zeros)
    return QuantTensor(codes, halves.view(np.float16), spec, zeros)


def round_symmetric(
    bits: NDArray[np.int32] | NDArray[np.uint16],
    spec: Spec,
    importance: NDArray[np.float32] | None = None,
) -> tuple[QuantTensor, NDArray[np.float64]]:
    """As `quantize_rtn`, of weights as bits: (rows, cols) of float32, or of bfloat16 in uint16.

    Args:
        spec: without zero points.

    Returns:
        The tensor and its `squared_error`, with sums over a group in float32: not finite if a
        weight is not, and then the tensor is void.
    """
    rows, cols = bits.shape
    if rows % LANES:
        bits = np.concatenate([bits, np.zeros((-rows % LANES, cols), bits.dtype)])
    codes, halves = _empty(bits.shape, spec)
    a, low, high = relative_importance(importance, cols), spec.qmin, spec.qmax
    steps = symmetric_steps(low) if spec.bits < 8 else np.empty(0, np.float32)
    sums = search_scales(bits, a, steps, low, high, codes, halves)
    scales = halves.view(np.float16)
    return QuantTensor(codes[:rows], scales[:rows], spec), np.array(sums)


def _empty(shape: tuple[int, ...], spec: Spec) -> tuple[NDArray[np.int8], NDArray[np.uint16]]:
    """For codes, and for the bits of scales."""
    rows, cols = shape
    return np.empty((rows, cols), np.int8), np.empty((rows, cols // spec.group), np.uint16)


def _on_row_steps(weight: NDArray[np.float32], found: QuantTensor, spec: Spec) -> QuantTensor:
    """The nearest codes on the scales of 8 bits next to those found."""
    scales = round_scales(found.scales)
    zeros = np.zeros(scales.shape, np.int8) if found.zeros is None else found.zeros
    codes = np.empty_like(found.codes)
    round_levels(weight, scales.astype(np.float32), zeros, spec.qmin, spec.qmax, codes)
    return replace(found, codes=codes, scales=scales, spec=spec)


def stored_scales(scales: NDArray[np.float16], spec: Spec) -> NDArray[np.float16]:
    """The nearest scales (rows, groups) that a spec can store."""
    return round_scales(scales) if spec.row_step else scales


def stacked(parts: Sequence[QuantTensor]) -> QuantTensor:
    """The rows of tensors of one spec, in one."""
    zeros = [part.zeros for part in parts if part.zeros is not None]
    return QuantTensor(
        np.concatenate([part.codes for part in parts]),
        np.concatenate([part.scales for part in parts]),
        parts[0].spec,
        np.concatenate(zeros) if zeros else None,
    )


def squared_error(weight: NDArray[np.float32], quantized: QuantTensor) -> NDArray[np.float64]:
    """Sum of the squared weight errors, and of the squared weights: (2,) float64."""
    error, energy = squares(weight, quantized.levels(), quantized.scales.astype(np.float32))
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


def relative_importance(importance: NDArray[np.float32] | None, cols: int) -> NDArray[np.float32]:
    """Importance with mean 1 and no zero: a group of unused channels still gets a fitting scale."""
    if importance is None or not importance.any():
        return np.ones(cols, np.float32)
    relative: NDArray[np.float32] = importance / importance.mean()
    return np.maximum(relative, np.float32(IMPORTANCE_FLOOR), out=relative)
