"""Keys and values of one layer as the attention kernel reads them, filled token by token."""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray

from uq.formats.pack import pack_pairs
from uq.kernels.npu.kernels.attention.codes import Array, Codes, quantize, rotate
from uq.kernels.npu.kernels.attention.frame import Frame
from uq.kernels.npu.kernels.attention.pack import blocked, weights_of
from uq.kernels.npu.kernels.attention.variant import Variant

Where = NDArray[np.intp]


class Store:
    """Codes in the order of the kernel's blocks, and a scale for each key and value.

    Attributes:
        frame: of the queries and keys of the text; given before its first keys come.
    """

    frame: Frame

    def __init__(self, variant: Variant, kv_heads: int, capacity: int) -> None:
        self.variant = variant
        blocks = -(-capacity // variant.keys)
        shape = (kv_heads, blocks, variant.keys * variant.head_dim)
        self._keys, self._values = np.zeros(shape, np.int8), np.zeros(shape, np.int8)
        scales = (kv_heads, blocks * variant.keys)
        self._scale, self._value_scale = np.zeros(scales, np.float32), np.zeros(scales, np.float32)

    def append(self, position: int, k: Array, v: Array) -> None:
        """Quantize keys and values (tokens, kv_heads, dim); what lay behind them is forgotten."""
        bits, end = self.variant.kv_bits, position + len(k)
        of_keys, of_values = _order(self.variant)
        block, slot = np.divmod(np.arange(position, end), self.variant.keys)
        for order, (made, scale), codes, scales in (
            (of_keys, self.frame.keys(k, bits), self._keys, self._scale),
            (of_values, quantize(rotate(v), bits), self._values, self._value_scale),
        ):
            codes[:, block[:, None], order[slot]] = made.swapaxes(0, 1)
            scales[:, position:end] = scale.T
            scales[:, end:] = 0  # keys of an earlier sequence weigh nothing

    def blocks(self, low: int, count: int) -> tuple[NDArray[np.void], Array]:
        """Blocks to send, (kv_heads, count), and the unit of each head's outputs.

        Args:
            low: position of the first key, the first of a block.
        """
        variant = self.variant
        heads, stored, _ = self._keys.shape
        sent = np.zeros((heads, count), variant.block)
        units = np.empty(heads, np.float32)
        first, kept = low // variant.keys, min(count, stored - low // variant.keys)
        part = slice(first, first + kept)
        sent["keys"][:, :kept] = _packed(self._keys[:, part], variant.kv_bits)
        sent["values"][:, :kept] = _packed(self._values[:, part], variant.kv_bits)
        scales = slice(low, low + kept * variant.keys)
        sent["scale"][:, :kept] = self._scale[:, scales].reshape(heads, kept, -1)
        for head in range(heads):
            weight, units[head] = weights_of(self._value_scale[head, scales])
            sent["weight"][head, :kept] = weight.reshape(kept, -1)
        return sent, units


def _packed(codes: Codes, bits: int) -> NDArray[np.uint8]:
    codes = np.ascontiguousarray(codes)
    return codes.view(np.uint8) if bits == 8 else pack_pairs(codes)


@cache
def _order(variant: Variant) -> tuple[Where, Where]:
    """Where in a block the channels of each of its keys lie, and of its values: (keys, dim)."""
    shape = (variant.keys, variant.head_dim)
    source = np.arange(variant.keys * variant.head_dim).reshape(shape)
    _, k, n = variant.tiles.score
    return tuple(  # type: ignore[return-value]
        np.argsort(order).reshape(shape)
        for order in (blocked(source.T, k, n), blocked(source, *variant.tiles.mix[1:]))
    )
