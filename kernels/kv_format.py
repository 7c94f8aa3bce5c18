"""Keys and values in 8 or 4 bits: what attention reads back from a quantized KV cache.

Values are harmless. A few channels of Gemma's keys are 8 to 60 times larger than the median and
hold almost the same number at every position. Three measures against that, each exact in float:

- balanced: channels of the keys are divided by s and those of the queries multiplied by it, which a
  device folds into the gains of k_norm and q_norm when it loads the model. The same s for both
  channels of a rotated pair, so that it commutes with RoPE.
- rotated: a Hadamard transform within each group (QuaRot, Ashkboos et al.); of the queries, too,
  and back on the mixed values.
- page: keys are stored less the mean of the page before, turned by RoPE to where they stand. A
  device adds query . mean once a page. The first page has no mean and holds the attention sink:
  its keys are INT8.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from uq.formats.config import GemmaConfig
from uq.kernels.attention import rope_tables
from uq.kernels.elementwise import rotate

Array = NDArray[np.float32]

SMALLEST_GAIN = 1 / 16  # of the median: channels below it are of no use to attention


@dataclass(frozen=True)
class KVFormat:
    """Symmetric codes, one float16 scale for each `group` channels of a head at one position.

    INT8 codes are -127..127; the largest magnitude has code 127. INT4 codes are -8..7 and scales
    have a sign, so that it has code -8.

    Attributes:
        balanced, rotated, page: see above; `page` is a number of positions.
    """

    bits: int
    group: int = 32
    balanced: bool = False
    rotated: bool = False
    page: int | None = None

    def keys(
        self, config: GemmaConfig, layer: int, weights: Mapping[str, Array], k: Array
    ) -> Array:
        """Keys as attention reads them.

        Args:
            k: (batch, keys, kv_heads, dim) behind RoPE, from position 0 on. Every one is
                quantized, a query's own included.
        """
        balance = _balance(config, weights) if self.balanced else np.float32(1)
        if self.page is None:
            return self._stored(k / balance) * balance
        means = _page_means(config, layer, k, self.page)
        stored = self._stored((k - means) / balance) * balance + means
        stored[:, : self.page] = _rounded(k[:, : self.page], 8, self.group)
        return stored

    def values(self, v: Array) -> Array:
        """Values as attention reads them, (batch, keys, kv_heads, dim)."""
        return self._stored(v)

    def _stored(self, x: Array) -> Array:
        if not self.rotated:
            return _rounded(x, self.bits, self.group)
        transform = _hadamard(self.group)
        turned = (x.reshape(-1, self.group) @ transform).reshape(x.shape)
        rounded = _rounded(turned, self.bits, self.group)
        return (rounded.reshape(-1, self.group) @ transform).reshape(x.shape)


def _rounded(x: Array, bits: int, group: int) -> Array:
    """codes * scales of x (..., channels)."""
    groups = x.reshape(*x.shape[:-1], -1, group)
    if bits == 8:
        low, high, ends = -127, 127, np.abs(groups).max(axis=-1, keepdims=True) / 127
    else:
        low, high = -8, 7
        largest = np.abs(groups).argmax(axis=-1, keepdims=True)
        ends = np.take_along_axis(groups, largest, axis=-1) / low
    scale = ends.astype(np.float16).astype(np.float32)
    codes = np.rint(groups / np.where(scale == 0, np.float32(1), scale)).clip(low, high)
    codes *= scale
    return codes.reshape(x.shape)


def _balance(config: GemmaConfig, weights: Mapping[str, Array]) -> Array | np.float32:
    """(dim,) sqrt(k gain / q gain): the s that spreads the error of scores evenly; 1 without norms.

    The error of a score is sum (q s) (error of k / s), and that of k / s grows with the largest
    |k| / s of its group.
    """
    if not config.qk_norm:
        return np.float32(1)
    k, q = (_pair_gains(weights[f"self_attn.{name}_norm"]) for name in "kq")
    balance: Array = np.sqrt(k / q)
    return balance


def _pair_gains(gain: Array) -> Array:
    """(dim,) root mean square gain of the two channels that RoPE turns together, never zero."""
    squares = (gain * gain).reshape(2, -1).mean(axis=0)
    pairs: Array = np.tile(np.sqrt(squares), 2)
    return pairs.clip(max(np.float32(SMALLEST_GAIN) * np.median(pairs), np.float32(1e-6)))


def _page_means(config: GemmaConfig, layer: int, k: Array, page: int) -> Array:
    """For each key the mean of the page before, turned by one page and stored in float16.

    Zero in the first page. Shapes as k: (batch, keys, kv_heads, dim).
    """
    batch, keys, heads, dim = k.shape
    before = (keys - 1) // page  # complete pages that another one follows
    blocks = k[:, : before * page].reshape(batch, before, page, heads, dim)
    means = np.zeros((batch, before + 1, heads, dim), np.float32)
    means[:, 1:] = blocks.mean(axis=2)
    cos, sin = rope_tables(config, layer, page, 1)
    rotate(means.reshape(-1, 1, heads, dim), cos, sin)
    means = means.astype(np.float16).astype(np.float32)
    return means.repeat(page, axis=1)[:, :keys]


@cache
def _hadamard(size: int) -> Array:
    """Sylvester's orthonormal matrix, (size, size), its own inverse."""
    matrix: Array = np.ones((1, 1), np.float32)
    while len(matrix) < size:
        matrix = np.kron(matrix, np.array([[1, 1], [1, -1]], np.float32))
    matrix /= np.sqrt(np.float32(size))
    return matrix
