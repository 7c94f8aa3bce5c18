"""Second moments of the inputs of k_proj as attention takes them.

Softmax sees differences of keys alone, and those of the keys that a query attends to. With a_ij
what query i of a head takes of key j, and m_i = sum_j a_ij x_j the average of the inputs, an
error E of k_proj counts

    sum_ij a_ij |E (x_j - m_i)|^2 = sum_j r_j |E x_j|^2 - sum_i |E m_i|^2,    r_j = sum_i a_ij.

With A the attention of all heads on a sequence X and G = A^T A, the moments are
X^T (diag(r) - G) X, however many heads there are. A is that of the floating-point path.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from uq.formats.config import GemmaConfig
from uq.kernels.attention import attention_shares
from uq.kernels.products import linear
from uq.kernels.reference import placed
from uq.kernels.weights import Weights
from uq.quantize.gptq import Statistics

Array = NDArray[np.float32]
Inputs = tuple[Array, Array | None]  # (sequences, length, n) of the quantized and the exact path

KEYS = "self_attn.k_proj"
EVERY = 2  # sequence of the calibration is used
FAINT = 1e-4  # of the inputs' mean square: what is left of less is rounding


def attended_statistics(
    config: GemmaConfig,
    layer: int,
    weights: Weights,
    inputs: Iterable[Inputs],
    shared: Statistics,
    share: float,
) -> dict[str, Statistics]:
    """Role -> statistics of its own, `share` of them as attention takes the inputs.

    All tokens alike remain the other part: without them, what is attended to in no text of the
    calibration would cost nothing.

    Args:
        weights: of the checkpoint.
        shared: what q_proj, k_proj and v_proj share.

    Returns:
        Nothing where no query has a choice of keys.
    """
    found, asked = _nothing(shared), 0
    for quantized, exact in _chosen(inputs):
        spread = _spread(config, layer, weights, quantized if exact is None else exact)
        right = spread @ quantized[0]  # (length, n)
        found.hessian[:] += quantized[0].T @ right
        if found.cross is not None and exact is not None:
            found.cross[:] += (exact[0] - quantized[0]).T @ right
        asked += config.num_heads * len(right)
    if not _trace(found) > FAINT * asked * _trace(shared):
        return {}
    return {KEYS: _blended(found, shared, share)}


def _chosen(inputs: Iterable[Inputs]) -> Iterator[Inputs]:
    """Every so many of the sequences, one at a time, however they are batched."""
    number = 0
    for quantized, exact in inputs:
        for index in range(-number % EVERY, len(quantized), EVERY):
            one = slice(index, index + 1)
            yield quantized[one], None if exact is None else exact[one]
        number += len(quantized)


def _spread(config: GemmaConfig, layer: int, weights: Weights, x: Array) -> Array:
    """diag(r) - G of one sequence (1, length, n): (length, length), summed over the heads."""
    q, k = (
        placed(config, layer, weights, name, linear(x, weights[f"self_attn.{name}_proj"]))
        for name in "qk"
    )
    found = np.zeros((x.shape[1],) * 2, np.float32)
    diagonal = np.einsum("ii->i", found)
    for block in attention_shares(config, layer, q, k):
        found[block.seen, block.seen] -= block.weights.T @ block.weights
        diagonal[block.seen] += block.weights.sum(axis=0)
    return found


def _nothing(like: Statistics) -> Statistics:
    cross = None if like.cross is None else np.zeros_like(like.cross)
    return replace(like, hessian=np.zeros_like(like.hessian), cross=cross)


def _blended(own: Statistics, shared: Statistics, share: float) -> Statistics:
    """`share` of `own`, in units of the other part's trace; in place."""
    factor = share * _trace(shared) / _trace(own)
    own.hessian[:] += own.hessian.T  # equal but for rounding
    own.hessian[:] *= factor / 2
    own.hessian[:] += (1 - share) * shared.hessian
    if own.cross is not None and shared.cross is not None:
        own.cross[:] *= factor
        own.cross[:] += (1 - share) * shared.cross
    return own


def _trace(found: Statistics) -> float:
    return float(np.trace(found.hessian))
