"""Rows of the embedding out of the packed table: the layout of `layout`, one code at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import prange
from numpy.typing import NDArray

from uq.kernels.cpu.elementwise import per_token
from uq.kernels.cpu.gemv import has_zeros
from uq.kernels.cpu.intrinsics import address, load_byte, load_half
from uq.kernels.cpu.layout import (
    BITS,
    CHUNKS_PER_GROUP,
    CODES,
    GROUP_BYTES,
    SCALES,
    STEP_BYTES,
    ZERO_BYTES,
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
    if not has_zeros(group.size):
        return 1 << (bits - 1)
    zeros = group[group.size - ZERO_BYTES :]
    return (np.int64(zeros[lane // 2]) >> 4 * (lane % 2) & 15) << (bits - 4)


@kernel()
def _stored_scale(group: int, steps: int, lane: int) -> Any:
    """A scale of the group at `group`; `steps`: where those of the row block lie, 0 without."""
    if steps:
        return load_byte(group + lane) * load_half(steps + 2 * lane)
    return load_half(group + 2 * lane)


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
    bits, per_group = part[BITS], part[CHUNKS_PER_GROUP]
    group_bytes, step_bytes = part[GROUP_BYTES], part[STEP_BYTES]
    chunks, size = hidden.shape[1] // CHUNK, bits * LINE
    for index in prange(tokens.size):
        block, lane = tokens[index] // LANES, tokens[index] % LANES
        at = part[CODES] + block * chunks * size
        steps_at = part[SCALES] + block * (step_bytes + chunks // per_group * group_bytes)
        steps = address(data) + steps_at if step_bytes else 0
        for chunk in range(chunks):
            group_at = steps_at + step_bytes + chunk // per_group * group_bytes
            group = data[group_at:][:group_bytes]
            scale = _stored_scale(address(group), steps, lane)
            zero = _stored_zero(group, bits, lane)
            codes = data[at + chunk * size :][:size]
            for channel in range(CHUNK):
                level = np.float32(_stored_code(codes, bits, lane, channel) - zero)
                hidden[index, chunk * CHUNK + channel] = level * scale * factor
