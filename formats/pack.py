"""Two four-bit codes in one byte, in the two nibble orders that the layouts use.

Codes are two's complement in every layout: zero padding is zero bytes, and a signed nibble needs no
correction term (`formats/README.md` shows the two-instruction unpacking).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

LOW_NIBBLES = 0x0F0F0F0F
HIGH_NIBBLES = 0xF0F0F0F0


def pack_pairs(codes: NDArray[np.int8]) -> NDArray[np.uint8]:
    """Neighbours share a byte: code `2i` is the low nibble of byte `i`, code `2i + 1` the high one.

    Args:
        codes: (..., n) int8 in -8..7, C order, n even.

    Returns:
        (..., n // 2) uint8.
    """
    pairs = codes.view("<u2")
    packed: NDArray[np.uint8] = ((pairs & 0x0F) | ((pairs >> 4) & 0xF0)).astype(np.uint8)
    return packed


def unpack_pairs(packed: NDArray[np.uint8]) -> NDArray[np.int8]:
    """Inverse of `pack_pairs`: (..., m) uint8 -> (..., 2 * m) int8."""
    pairs = packed.astype("<u2")
    return _sign((pairs | (pairs << 4)) & 0x0F0F)


def pack_quads(codes: NDArray[np.int8]) -> NDArray[np.uint8]:
    """Runs of four share a 32-bit word: `word & 0x0F0F0F0F` holds codes 0..3 of eight, one a byte,
    and `(word >> 4) & 0x0F0F0F0F` holds codes 4..7.

    Args:
        codes: (..., n) int8 in -8..7, C order, n a multiple of 8.

    Returns:
        (..., n // 2) uint8.
    """
    eights = codes.view("<u8")
    words = (eights & LOW_NIBBLES) | ((eights >> 28) & HIGH_NIBBLES)
    return words.astype("<u4").view(np.uint8)


def unpack_quads(packed: NDArray[np.uint8]) -> NDArray[np.int8]:
    """Inverse of `pack_quads`: (..., m) uint8, C order, m a multiple of 4 -> (..., 2 * m) int8."""
    words = packed.view("<u4").astype("<u8")
    return _sign((words & LOW_NIBBLES) | ((words & HIGH_NIBBLES) << 28))


def _sign(nibbles: NDArray[np.integer]) -> NDArray[np.int8]:
    """Read every byte 0..15 as a four-bit two's complement number."""
    codes = nibbles.view(np.int8)
    codes ^= 8
    codes -= 8
    return codes
