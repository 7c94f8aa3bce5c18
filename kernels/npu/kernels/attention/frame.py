"""How queries and keys of a layer are turned in front of quantization, so that it loses little.

Nothing of this changes what softmax gives for floats, and the kernel does not know of it:

- keys are stored less one row, the mean of the first ones: every score of a query changes alike;
- channels of the keys are multiplied by b, those of the queries divided by it. The error of a score
  is sum (q / b) (error of b k), and least with b = (mean of q^2 / mean of k^2)^(1/4). Both channels
  that RoPE turns together share theirs, because their parts change with the position;
- a Hadamard transform spreads what is large in a few channels;
- keys are rounded so that q . error is small for queries like the first ones.

Scores that are capped do change with a row that all keys lose; their keys keep it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from uq.kernels.npu.kernels.attention.codes import (
    Array,
    Codes,
    QueryCodes,
    hadamard,
    quantize,
    rotate,
    round_with_feedback,
)

FIRST = 128  # tokens that make a frame
PRIOR = 64  # tokens that one without correlations between channels counts for
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Frame:
    """Of each KV head, made from the first tokens of a text and kept for all that follow.

    Attributes:
        center, balance: (kv_heads, dim) what keys lose, and what they are multiplied by then.
        triangles: (kv_heads, dim, dim), of `round_with_feedback`.
    """

    center: Array
    balance: Array
    triangles: Array

    @classmethod
    def of(cls, q: Array, k: Array, *, capped: bool = False) -> Frame:
        """
        Args:
            q, k: (tokens, heads, dim) and (tokens, kv_heads, dim) behind RoPE; the first FIRST of
                each are read.
        """
        queries, keys = (x[:FIRST].astype(np.float64) for x in (q, k))
        _, heads, dim = keys.shape
        grouped = queries.reshape(len(queries), heads, -1, dim)  # (tokens, kv_heads, group, dim)
        # One token is its own mean, and nothing would be left of it.
        center = keys.mean(axis=0) * (0.0 if capped else 1 - 1 / len(keys))
        of_queries, of_keys = _energy(grouped), _energy((keys - center)[:, :, None])
        balance = (of_queries / of_keys) ** 0.25
        balanced = grouped / balance[:, None]
        prior = of_queries / balance**2
        triangles = [_triangle(balanced[:, head], prior[head]) for head in range(heads)]
        return cls(*(x.astype(np.float32) for x in (center, balance, np.stack(triangles))))

    def queries(self, q: Array) -> tuple[QueryCodes, Array]:
        """Codes of 16 bits (tokens, heads, dim) and scales (tokens, heads)."""
        group = q.shape[1] // len(self.balance)
        return quantize(rotate(q / self.balance.repeat(group, axis=0)), 16)

    def keys(self, k: Array, bits: int) -> tuple[Codes, Array]:
        """Codes (tokens, kv_heads, dim) and scales (tokens, kv_heads)."""
        turned = rotate((k - self.center) * self.balance)
        codes, scale = np.empty(k.shape, np.int8), np.empty(k.shape[:2], np.float32)
        for head, triangle in enumerate(self.triangles):
            codes[:, head], scale[:, head] = round_with_feedback(turned[:, head], bits, triangle)
        return codes, scale

    def floats(self, codes: Codes, scale: Array) -> Array:
        """The keys that codes stand for."""
        return rotate(codes * scale[..., None]) / self.balance + self.center


def _energy(x: Floats) -> Floats:
    """(kv_heads, dim) mean square of rows (tokens, kv_heads, any, dim), the same for both channels
    of a RoPE pair, and never zero: few tokens say little about a channel."""
    squares = (x * x).mean(axis=(0, 2))
    heads, dim = squares.shape
    pairs = np.tile(squares.reshape(heads, 2, dim // 2).mean(axis=1), 2)
    floor = squares.mean(axis=1, keepdims=True) / len(x)
    filled: Floats = pairs + np.where(floor > 0, floor, 1)
    return filled


def _triangle(q: Floats, energy: Floats) -> Floats:
    """U, with ones on its diagonal, of U^T D U = mean of q q^T, shrunk to its diagonal.

    Args:
        q: (tokens, group, dim) balanced, not rotated.
        energy: (dim,) of a balanced query.
    """
    dim = len(energy)
    prior = (np.diag(energy) + np.eye(dim) * energy.mean()) / 2
    rows = q.reshape(-1, dim)
    share = len(q) / (len(q) + PRIOR)
    turn = hadamard(dim).astype(np.float64)
    mean = turn @ (share * rows.T @ rows / len(rows) + (1 - share) * prior) @ turn
    upper = np.linalg.cholesky(mean).T
    unit: Floats = upper / np.diag(upper)[:, None]
    return unit
