"""Weights that already lie on the grid they are to be rounded to: their codes are kept.

Checkpoints of quantization-aware training (Google's `*-qat-q4_0-unquantized`) store code * scale,
rounded to bfloat16; GGUF files of Q4_0, Q5_0 and Q8_0 give it exactly. Calibration would move such
weights off the codes they were trained for, and cannot win: the codes are found again instead.

A group has a grid if its weights are what whole multiples of one scale round to in the checkpoint's
number format. Scales near (largest weight) / m are tried for m = 1, 2, ..., the coarsest first; of
all that give the weights the middle one is taken.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numba import njit
from numpy.typing import NDArray

from uq.formats.checkpoint import Checkpoint
from uq.formats.config import layer_tensor
from uq.formats.half import from_half, to_half
from uq.formats.spec import QuantTensor, Spec
from uq.quantize.plan import Plan
from uq.quantize.scales import quantize_rtn

# Half the distance of two numbers of the format at 1; GGUF's blocks are not rounded.
FLOATS = {"bf16": 2.0**-8, "f16": 2.0**-11, "f32": 2.0**-24}
ROUNDING = FLOATS | dict.fromkeys(("q4_0", "q5_0", "q8_0"), 0.0)
SLACK = 2.0**-16  # for products of two roundings, and float32 arithmetic
SHARE = 0.99  # of a tensor's groups that must have a grid
SAMPLE_ROWS = 32


def recognise(checkpoint: Checkpoint, plan: Plan) -> Plan:
    """The plan with method `grid` for every tensor that a sample of rows shows on its grid.

    Reads the samples of all linears only if the first layer has such a linear: training with
    quantization leaves none out.

    Raises:
        CheckpointError: a value is NaN or infinite.
    """
    first = [layer_tensor(0, role) for role in checkpoint.config.linear_shapes(0)]
    blocks = any(checkpoint.tensors[name].dtype.startswith("q") for name in plan.tensors)
    if blocks or any(_has_grid(checkpoint, name, plan.tensors[name].spec) for name in first):
        names = list(plan.tensors)
    else:
        names = [name for name in plan.tensors if ".layers." not in name]
    found = {
        name: replace(plan.tensors[name], method="grid")
        for name in names
        if _has_grid(checkpoint, name, plan.tensors[name].spec)
    }
    return plan.with_grids(found)


def recover(
    weight: NDArray[np.float32], spec: Spec, dtype: str
) -> tuple[QuantTensor, NDArray[np.bool_]]:
    """Codes and scales of a weight on its grid; groups without one are rounded to nearest.

    Args:
        weight: (rows, cols) float32, finite.
        spec: without zero points; its group divides cols.
        dtype: number format of the checkpoint, a key of `ROUNDING`.

    Returns:
        The tensor, and which groups have a grid: (rows, cols // group).
    """
    rows, cols = weight.shape
    codes = np.zeros((rows, cols), np.int8)
    halves = np.zeros((rows, cols // spec.group), np.uint16)
    fits = np.zeros(halves.shape, np.bool_)
    weight, rounding = np.ascontiguousarray(weight), ROUNDING[dtype]
    _recover(weight, rounding, spec.qmin, spec.qmax, codes, halves, fits)
    if not fits.all():
        rounded = quantize_rtn(weight, spec)
        codes = np.where(fits.repeat(spec.group, axis=1), codes, rounded.codes)
        halves = np.where(fits, halves, rounded.scales.view(np.uint16))
    return QuantTensor(codes, halves.view(np.float16), spec), fits


def misfit(fitting: int, groups: int) -> str | None:
    """What to tell of a tensor some of whose groups have no grid."""
    if fitting == groups:
        return None
    return f"{groups - fitting} of {groups} groups off the grid, rounded to nearest"


def _has_grid(checkpoint: Checkpoint, name: str, spec: Spec) -> bool:
    """Whether rows from the middle of a tensor lie on a grid of `spec`."""
    info = checkpoint.tensors[name]
    if info.dtype not in ROUNDING or spec.zero_point:
        return False
    start = max(0, info.shape[0] // 2 - SAMPLE_ROWS // 2)
    rows = checkpoint.rows(name, start, min(start + SAMPLE_ROWS, info.shape[0]))
    return bool(rows.any()) and bool(recover(rows, spec, info.dtype)[1].mean() >= SHARE)


@njit(nogil=True, cache=True)
def _recover(
    weight: NDArray[np.float32],
    rounding: float,
    qmin: int,
    qmax: int,
    codes: NDArray[np.int8],
    halves: NDArray[np.uint16],
    fits: NDArray[np.bool_],
) -> None:
    """Fill codes, bits of float16 scales and `fits` of the groups that have a grid."""
    rows, groups = halves.shape
    group = weight.shape[1] // groups
    for row in range(rows):
        for g in range(groups):
            here = slice(g * group, (g + 1) * group)
            w = weight[row, here]
            largest = np.float64(0)
            for i in range(group):
                largest = np.float64(w[i]) if abs(w[i]) > abs(largest) else largest
            if largest == 0:
                fits[row, g] = True
                continue
            for m in range(1, -qmin + 1):
                # Only the negative end of the codes reaches qmin: the largest weight goes there.
                step = abs(largest) / m if m <= qmax else largest / -m
                if not _multiples(w, step, qmax, 2 * rounding + SLACK, codes[row, here]):
                    continue
                halves[row, g] = to_half(np.float32(_common_scale(w, codes[row, here], rounding)))
                if from_half(halves[row, g]) != 0:
                    fits[row, g] = True
                    break


@njit(nogil=True, cache=True)
def _multiples(
    w: NDArray[np.float32], step: float, qmax: int, bound: float, codes: NDArray[np.int8]
) -> bool:
    """Fill the codes; False as soon as one is off by more than `bound` of its weight."""
    for i in range(len(w)):
        code = np.rint(w[i] / step)
        if code > qmax or abs(w[i] - code * step) > bound * abs(w[i]):
            return False
        codes[i] = np.int8(code)
    return True


@njit(nogil=True, cache=True)
def _common_scale(w: NDArray[np.float32], codes: NDArray[np.int8], rounding: float) -> float:
    """The middle of all scales whose products with the codes round to the weights; 0 for none."""
    low, high = -np.inf, np.inf
    for i in range(len(w)):
        if codes[i] != 0:
            half_step = rounding * 2.0 ** np.floor(np.log2(abs(np.float64(w[i])))) / abs(codes[i])
            ratio = np.float64(w[i]) / codes[i]
            low, high = max(low, ratio - half_step), min(high, ratio + half_step)
    return (low + high) / 2 if low - high <= SLACK * abs(low) else 0.0
