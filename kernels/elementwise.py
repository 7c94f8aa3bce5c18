"""Parts of the forward pass that are no matrix product, compiled: norms, gate, RoPE, softmax.

Float32, one pass over memory where possible. They run on one thread: between two matrix products
a second pool of threads would fight the idle one of BLAS for the cores, and lose more than it wins.
`exp` is a polynomial, so that the compiler can run it on whole vectors: a call into the C library
inside a loop would cost ten times as much.
"""

from __future__ import annotations

from functools import partial

import numpy as np
from numba import njit
from numpy.typing import NDArray

# Sums may be reordered (vectors need it); NaN and infinity keep their meaning, so that a broken
# model gives NaN and not a plausible number.
FAST = {"reassoc", "contract", "nsz"}

# Division by zero must give infinity, as it does in numpy: the check for it would prevent vectors.
kernel = partial(njit, cache=True, nogil=True, error_model="numpy")

_LOG2_E = np.float32(1.44269504)
_LN2_HIGH = np.float32(0.693359375)  # few bits: its product with a whole number is exact
_LN2_LOW = np.float32(-2.12194440e-4)
_EXP_LOW, _EXP_HIGH = np.float32(-87.0), np.float32(88.0)  # beyond: subnormal, infinite
_P0, _P1, _P2 = np.float32(1.9875691e-4), np.float32(1.3981999e-3), np.float32(8.3334519e-3)
_P3, _P4, _P5 = np.float32(4.1665795e-2), np.float32(1.6666665e-1), np.float32(5.0000001e-1)
_ZERO, _ONE, _TWO, _HALF = np.float32(0.0), np.float32(1.0), np.float32(2.0), np.float32(0.5)
_GELU_SCALE = np.float32(2.0 * np.sqrt(2.0 / np.pi))
_GELU_CUBE = np.float32(0.044715)
_GELU_LOW = np.float32(-34.0)  # gates from -6.8 down


# No "reassoc" here: it would undo the two-step reduction by ln 2.
@kernel(fastmath={"contract"})
def exp32(x: np.float32) -> np.float32:
    """exp(x) within 1e-7 relative for -87 <= x <= 88, clamped outside (Cephes, expf)."""
    x = _EXP_LOW if x < _EXP_LOW else x
    x = _EXP_HIGH if x > _EXP_HIGH else x
    n = np.floor(x * _LOG2_E + _HALF)
    r = x - n * _LN2_HIGH
    r = r - n * _LN2_LOW
    p = ((((_P0 * r + _P1) * r + _P2) * r + _P3) * r + _P4) * r + _P5
    exponent = np.int32((np.int32(n) + 127) << 23)  # bits of the float32 2 ** n
    result: np.float32 = (p * (r * r) + r + _ONE) * exponent.view(np.float32)
    return result


@kernel(fastmath=FAST)
def rms_norm_rows(
    x: NDArray[np.float32], gain: NDArray[np.float32], eps: np.float32, out: NDArray[np.float32]
) -> None:
    """out = x / sqrt(mean(x^2) + eps) * gain; x, out (rows, n), gain (n,)."""
    rows, n = x.shape
    for row in range(rows):
        total = np.float32(0.0)
        for i in range(n):
            total += x[row, i] * x[row, i]
        factor = _ONE / np.sqrt(total / np.float32(n) + eps)
        for i in range(n):
            out[row, i] = x[row, i] * factor * gain[i]


@kernel(fastmath=FAST)
def gelu_product(gate: NDArray[np.float32], up: NDArray[np.float32]) -> None:
    """gate = gelu(gate) * up in place, both (rows, n); gelu in its tanh form.

    0.5 * x * (1 + tanh(v)) = x / (1 + exp(-2 v)), v = sqrt(2 / pi) * (x + 0.044715 x^3)
    (Hendrycks and Gimpel, Gaussian Error Linear Units). What is below 1e-14 becomes 0: squares of
    the tail, which second moments sum up, would be subnormal, and those take a hundred cycles.
    """
    rows, n = gate.shape
    for row in range(rows):
        for i in range(n):
            x = gate[row, i]
            twice = _GELU_SCALE * (x + _GELU_CUBE * x * x * x)
            found = x / (_ONE + exp32(-twice))
            gate[row, i] = (_ZERO if twice < _GELU_LOW else found) * up[row, i]


@kernel(fastmath=FAST)
def rotate(x: NDArray[np.float32], cos: NDArray[np.float32], sin: NDArray[np.float32]) -> None:
    """RoPE in place, half-split: component i turns with component i + dim / 2.

    x (batch, length, heads, dim); cos, sin (length, dim / 2).
    """
    batch, length, heads, dim = x.shape
    half = dim // 2
    for token in range(batch * length):
        b, t = token // length, token % length
        for head in range(heads):
            for i in range(half):
                low, high = x[b, t, head, i], x[b, t, head, half + i]
                x[b, t, head, i] = low * cos[t, i] - high * sin[t, i]
                x[b, t, head, half + i] = high * cos[t, i] + low * sin[t, i]


@kernel(fastmath=FAST | {"nnan"})
def row_peak(values: NDArray[np.float32]) -> np.float32:
    peak: np.float32 = values[0]
    for i in range(1, values.size):
        peak = max(peak, values[i])
    return peak


@kernel(fastmath=FAST)
def masked_softmax(
    scores: NDArray[np.float32], group: int, offset: int, window: int, scale: float, softcap: float
) -> None:
    """Turn raw products q.k into attention weights, in place; masked keys get 0.

    Args:
        scores: (queries * group, keys) float32; row r belongs to query r // group.
        group: query heads that share one key head.
        offset: index among the keys of query 0's own key.
        window: number of keys that a query sees, its own included.
        scale: multiplies the raw products.
        softcap: c in c * tanh(s / c), or 0 for none.
    """
    rows, keys = scores.shape
    factor, cap = np.float32(scale), np.float32(softcap)
    for row in range(rows):
        own = offset + row // group
        low = max(0, own - window + 1)
        visible = scores[row, low : own + 1]
        for i in range(visible.size):
            visible[i] *= factor
        if cap > 0:
            for i in range(visible.size):  # tanh(u) = 1 - 2 / (1 + exp(2 u))
                visible[i] = cap - _TWO * cap / (_ONE + exp32(_TWO * visible[i] / cap))
        peak = row_peak(visible)
        total = np.float32(0.0)
        for i in range(visible.size):
            visible[i] = exp32(visible[i] - peak)
            total += visible[i]
        inverse = _ONE / total
        for i in range(visible.size):
            visible[i] *= inverse
        scores[row, :low] = 0.0
        scores[row, own + 1 : keys] = 0.0
