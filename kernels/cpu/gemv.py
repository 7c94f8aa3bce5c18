"""One token times any number of weights that share its input: the kernels of decoding.

Activations are 16-bit fixed point with one float32 scale for every 32 channels (an error of at most
2^-16 of the chunk's largest value), so a chunk's dot product is exact in int32 and `gemm` gets the
same bits in another order of work. Decoding is bound by memory: a block's codes are one stream, and
they are asked for well before they are needed.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import prange
from numpy.typing import NDArray

from uq.kernels.cpu.intrinsics import (
    add,
    address,
    dot,
    even_bytes,
    load_halves,
    load_words,
    nibble_pair,
    odd_bytes,
    prefetch,
    scaled,
    splat_float,
    splat_word,
    store_floats,
    zero_floats,
    zero_ints,
)
from uq.kernels.cpu.layout import BITS, BLOCKS, CHUNKS_PER_GROUP, CODES, FIRST_BLOCK, SCALES
from uq.kernels.cpu.llvm import AHEAD, LANES
from uq.kernels.elementwise import kernel

LINE = 64
CHUNK_INT4, CHUNK_INT8 = 4 * LINE, 8 * LINE
X_CHUNK = 64  # bytes of 32 int16


@kernel()
def find_part(parts: NDArray[np.int64], block: int) -> int:
    """The weight that row block `block` of a `Linear` belongs to."""
    part = 0
    while block >= parts[part, FIRST_BLOCK] + parts[part, BLOCKS]:
        part += 1
    return part


@kernel()
def _chunk_int4(codes: int, x: int, start: Any) -> Any:
    """start + 16 dot products over 32 channels; codes are stored plus 8."""
    first, second = start, zero_ints()
    for word in range(4):
        prefetch(codes + AHEAD + LINE * word)
        words = load_words(codes + LINE * word)
        for half in range(2):
            pairs = x + 16 * word + 8 * half
            first = dot(first, splat_word(pairs), nibble_pair(words, 2 * half))
            second = dot(second, splat_word(pairs + 4), nibble_pair(words, 2 * half + 1))
    return add(first, second)


@kernel()
def _chunk_int8(codes: int, x: int) -> Any:
    """16 dot products over 32 channels."""
    even, odd = zero_ints(), zero_ints()
    for word in range(8):
        prefetch(codes + AHEAD + LINE * word)
        words = load_words(codes + LINE * word)
        pairs = x + 16 * (word // 2) + 4 * (word % 2)
        even = dot(even, splat_word(pairs), even_bytes(words))
        odd = dot(odd, splat_word(pairs + 8), odd_bytes(words))
    return add(even, odd)


@kernel()
def _block_int4(
    codes: int, scales: int, groups: int, per_group: int, x: int, x_scale: int, offset: int
) -> Any:
    total = zero_floats()
    for group in range(groups):
        scale = load_halves(scales + 2 * LANES * group)
        for _ in range(per_group):
            dots = _chunk_int4(codes, x, splat_word(offset))
            total = scaled(total, dots, splat_float(x_scale), scale)
            codes, x, x_scale, offset = codes + CHUNK_INT4, x + X_CHUNK, x_scale + 4, offset + 4
    return total


@kernel()
def _block_int8(codes: int, scales: int, groups: int, per_group: int, x: int, x_scale: int) -> Any:
    total = zero_floats()
    for group in range(groups):
        scale = load_halves(scales + 2 * LANES * group)
        for _ in range(per_group):
            total = scaled(total, _chunk_int8(codes, x), splat_float(x_scale), scale)
            codes, x, x_scale = codes + CHUNK_INT8, x + X_CHUNK, x_scale + 4
    return total


@kernel(parallel=True)
def gemv(
    data: NDArray[np.uint8],
    parts: NDArray[np.int64],
    codes: NDArray[np.int16],
    scales: NDArray[np.float32],
    offsets: NDArray[np.int32],
    out: NDArray[np.float32],
) -> None:
    """out = W x, the weights' outputs one after the other.

    Args:
        data, parts: the arena and a `Linear`'s weights in it.
        codes, scales, offsets: one row of `Activations`: (1, cols), (1, chunks), (1, chunks).
        out: (1, width) float32.
    """
    chunks = scales.shape[1]
    x, x_scale, offset = address(codes), address(scales), address(offsets)
    for block in prange(out.shape[1] // LANES):
        part = parts[find_part(parts, block)]
        bits, per_group = part[BITS], part[CHUNKS_PER_GROUP]
        groups, inner = chunks // per_group, block - part[FIRST_BLOCK]
        at = address(data) + part[CODES] + inner * chunks * bits * LINE
        scale = address(data) + part[SCALES] + inner * groups * 2 * LANES
        if bits == 4:
            total = _block_int4(at, scale, groups, per_group, x, x_scale, offset)
        else:
            total = _block_int8(at, scale, groups, per_group, x, x_scale)
        store_floats(address(out) + block * LINE, total)
