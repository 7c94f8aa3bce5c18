"""Codes of less than a byte: nibbles two in a byte, and the bits above them, in several orders.

Codes are two's complement in every layout: zero padding is zero bytes, and a signed nibble needs no
correction term (`formats/README.md` shows the two-instruction unpacking). INT5 and INT6 keep their
lower four bits as INT4 keeps its codes, and the one or two bits above in a plane of their own.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

LOW_NIBBLES = 0x0F0F0F0F
HIGH_NIBBLES = 0xF0F0F0F0


def pack_pairs(codes: NDArray[np.int8]) -> NDArray[np.uint8]:
    """Neighbours share a byte: code `2i` is the low nibble of byte `i`, code `2i + 1` the high one.

    Args:
        codes: (..., n) int8, C order, n even; their lower four bits count.

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
        codes: (..., n) int8, C order, n a multiple of 8; their lower four bits count.

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


def pack_masks(codes: NDArray[np.int8], high: int) -> NDArray[np.uint8]:
    """Bits 4 and up of 32 codes as `high` 32-bit masks, bit 4 first; bit `i` belongs to code `i`.

    Args:
        codes: (..., n) int8, C order, n a multiple of 32.

    Returns:
        (..., n // 8 * high) uint8.
    """
    runs = codes.view(np.uint8).reshape(*codes.shape[:-1], -1, 1, 32)
    bits = runs >> np.arange(4, 4 + high, dtype=np.uint8)[:, None] & 1  # (..., n / 32, high, 32)
    packed = np.packbits(bits, axis=-1, bitorder="little")
    return packed.reshape(*codes.shape[:-1], -1)


def unpack_masks(packed: NDArray[np.uint8], high: int) -> NDArray[np.uint8]:
    """Inverse of `pack_masks`: (..., m) uint8 -> (..., m * 8 // high), the bits at 4 and up."""
    masks = packed.reshape(*packed.shape[:-1], -1, high, 4)
    bits = np.unpackbits(masks, axis=-1, bitorder="little")  # (..., n / 32, high, 32)
    bits <<= np.arange(4, 4 + high, dtype=np.uint8)[:, None]
    joined: NDArray[np.uint8] = np.bitwise_or.reduce(bits, axis=-2)
    return joined.reshape(*packed.shape[:-1], -1)


def pack_fields(codes: NDArray[np.int8], high: int) -> NDArray[np.uint32]:
    """Bits 4 and up of runs of four codes, in `high` 32-bit words for 32 codes.

    A word's four bytes belong to codes 0..3 of every run of four. Run `m` has the bits from
    `high * m % 8` of word `high * m // 8`, so that a shift and a mask give the bits of four
    consecutive codes in the four bytes of a word.

    Args:
        codes: (..., n) int8, C order, n a multiple of 32.

    Returns:
        (..., n // 32 * high) uint32.
    """
    runs = codes.view("<u4").reshape(*codes.shape[:-1], -1, 8 // high)  # (..., words, runs)
    fields = (runs >> 4 & _field_mask(high)) << np.arange(0, 8, high, dtype=np.uint32)
    words: NDArray[np.uint32] = np.bitwise_or.reduce(fields, axis=-1)
    return words


def unpack_fields(words: NDArray[np.uint32], high: int) -> NDArray[np.uint8]:
    """Inverse of `pack_fields`: (..., m) -> (..., m * 32 // high) uint8, the bits at 4 and up."""
    runs = (words[..., None] >> np.arange(0, 8, high, dtype=np.uint32) & _field_mask(high)) << 4
    return runs.astype("<u4").reshape(*words.shape[:-1], -1).view(np.uint8)


def join_planes(nibbles: NDArray[np.int8], high_bits: NDArray[np.uint8], high: int) -> None:
    """Codes of `4 + high` bits from their nibbles, which are overwritten, and the bits above them.

    Args:
        nibbles: int8, of which the lower four bits count.
        high_bits: uint8, bits 4 and up of each code, of the same shape.
    """
    sign = np.int8(8 << high)
    nibbles &= 15
    nibbles |= high_bits.view(np.int8)
    nibbles ^= sign
    nibbles -= sign


def _field_mask(high: int) -> np.uint32:
    """The lower `high` bits of every byte."""
    return np.uint32(((1 << high) - 1) * 0x01010101)


def _sign(nibbles: NDArray[np.integer]) -> NDArray[np.int8]:
    """Read every byte 0..15 as a four-bit two's complement number."""
    codes = nibbles.view(np.int8)
    codes ^= 8
    codes -= 8
    return codes
