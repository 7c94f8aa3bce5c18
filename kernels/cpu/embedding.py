"""Rows of the embedding out of the packed table: the layout of `layout`, one code at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import prange
from numpy.typing import NDArray

from uq.kernels.cpu.elementwise import per_token
from uq.kernels.cpu.intrinsics import address, load_half
from uq.kernels.cpu.layout import (
    BITS,
    CHUNKS_PER_GROUP,
    CODES,
    GROUP_BYTES,
    SCALE_BYTES,
    SCALES,
)
from uq.kernels.cpu.llvm import CHUNK, LANES
from uq.kernels.elementwise import kernel

LINE = 4 * LANES  # bytes of a vector


@kernel()
def _stored_code(chunk: NDArray[np.uint8], bits: int, lane: int, channel: int) -> Any:
    """A code of a chunk, counted from `qmin`; an INT8 code itself."""
    if bits == 8:
        return np.int64(np.int8(chunk[channel // 4 * LINE + 4 * lane + channel % 4]))
    lines = chunk[4 * lane + channel % 4 :]
    byte = np.int64(lines[channel // 8 * LINE])
    nibble = byte >> 4 if channel & 4 else byte & 15
    if bits == 4:
        return nibble
    field = (bits - 4) * (channel // 4)
    high = np.int64(lines[(4 + field // 8) * LINE]) >> field % 8
    return nibble | (high & ((1 << (bits - 4)) - 1)) << 4


@kernel()
def _stored_zero(group: NDArray[np.uint8], bits: int, lane: int) -> Any:
    """What `_stored_code` gives for a weight of zero."""
    if bits == 8:
        return 0
    if group.size == SCALE_BYTES:
        return 1 << (bits - 1)
    return (np.int64(group[SCALE_BYTES + lane // 2]) >> 4 * (lane % 2) & 15) << (bits - 4)


@per_token
def embed(
    tokens: NDArray[np.int32],
    data: NDArray[np.uint8],
    parts: NDArray[np.int64],
    factor: np.float32,
    hidden: NDArray[np.float32],
) -> None:
    """hidden (tokens, cols) = embedding rows * factor."""
    part = parts[0]
    bits, per_group, group_bytes = part[BITS], part[CHUNKS_PER_GROUP], part[GROUP_BYTES]
    chunks, size = hidden.shape[1] // CHUNK, bits * LINE
    for index in prange(tokens.size):
        block, lane = tokens[index] // LANES, tokens[index] % LANES
        at = part[CODES] + block * chunks * size
        group_at = part[SCALES] + block * (chunks // per_group) * group_bytes
        for chunk in range(chunks):
            group = data[group_at + chunk // per_group * group_bytes :][:group_bytes]
            scale, zero = load_half(address(group) + 2 * lane), _stored_zero(group, bits, lane)
            codes = data[at + chunk * size :][:size]
            for channel in range(CHUNK):
                level = np.float32(_stored_code(codes, bits, lane, channel) - zero)
                hidden[index, chunk * CHUNK + channel] = level * scale * factor
