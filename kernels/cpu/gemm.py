"""Many tokens times any number of weights that share their input: the kernels of prefill.

Two row blocks are unpacked to int16 once, for a span of channels that stays in the first cache,
and then serve every token; a tile of tokens is held in registers. Chunks are added in the order of
`gemv`, so both give the same bits.
"""

from __future__ import annotations

import numpy as np
from numba import get_thread_id, prange
from numpy.typing import NDArray

from uq.kernels.cpu.codes import LINE, chunk_unpack
from uq.kernels.cpu.gemv import X_CHUNK, find_part, load_scales, load_zeros
from uq.kernels.cpu.intrinsics import address, load_halves, store_floats
from uq.kernels.cpu.layout import (
    BITS,
    CHUNKS_PER_GROUP,
    CODES,
    FIRST_BLOCK,
    GROUP_BYTES,
    SCALES,
    STEP_BYTES,
)
from uq.kernels.cpu.llvm import CHUNK, LANES
from uq.kernels.cpu.tiles import TILE_LANES, TILE_ROWS, chunk_tile
from uq.kernels.elementwise import kernel

SPAN = 16  # chunks unpacked at a time: 32 KiB, which stay in the first cache
PAIRS = CHUNK // 2
STEP = 4 * TILE_LANES  # bytes of one pair of channels in an unpacked tile
CHUNK_TILE = PAIRS * STEP

_int4, _int5, _int6, _int8 = (chunk_unpack(bits, STEP) for bits in (4, 5, 6, 8))
_wide, _narrow, _single = chunk_tile(TILE_ROWS), chunk_tile(4), chunk_tile(1)


def gemm_scratch(tokens: int) -> int:
    """Float32 numbers of scratch that each thread needs."""
    return tokens * TILE_LANES + SPAN * (TILE_LANES + CHUNK_TILE // 4)


@kernel()
def _unpack(
    data: NDArray[np.uint8],
    part: NDArray[np.int64],
    block: int,
    first: int,
    last: int,
    chunks: int,
    out: int,
    out_scale: int,
) -> None:
    """Chunks `first:last` of a row block: codes as int16, the scale of each chunk as float32."""
    bits, per_group = part[BITS], part[CHUNKS_PER_GROUP]
    group_bytes, step_bytes = part[GROUP_BYTES], part[STEP_BYTES]
    inner = block - part[FIRST_BLOCK]
    codes = address(data) + part[CODES] + (inner * chunks + first) * bits * LINE
    size = step_bytes + chunks // per_group * group_bytes
    groups = address(data) + part[SCALES] + inner * size
    steps = load_halves(groups)
    groups += step_bytes
    for chunk in range(first, last):
        group = groups + chunk // per_group * group_bytes
        zeros = load_zeros(group, group_bytes, bits)
        if bits == 4:
            _int4(codes, zeros, out)
        elif bits == 5:
            _int5(codes, zeros, out)
        elif bits == 6:
            _int6(codes, zeros, out)
        else:
            _int8(codes, zeros, out)
        store_floats(out_scale, load_scales(group, steps, step_bytes))
        codes, out, out_scale = codes + bits * LINE, out + CHUNK_TILE, out_scale + 4 * TILE_LANES


@kernel()
def _multiply(
    rows: int, count: int, x: int, x_row: int, xs: int, xs_row: int, w: int, ws: int, out: int
) -> None:
    """out (rows, TILE_LANES) += `count` chunks of x times those of one unpacked tile."""
    out_row = 4 * TILE_LANES
    row = 0
    while row < rows:
        left = rows - row
        height = TILE_ROWS if left >= TILE_ROWS else (4 if left >= 4 else 1)
        at, at_scale, at_out = x + row * x_row, xs + row * xs_row, out + row * out_row
        for chunk in range(count):
            a, a_scale = at + chunk * X_CHUNK, at_scale + 4 * chunk
            b, b_scale = w + chunk * CHUNK_TILE, ws + chunk * out_row
            if height == TILE_ROWS:
                _wide(a, x_row, a_scale, xs_row, b, b_scale, at_out, out_row)
            elif height == 4:
                _narrow(a, x_row, a_scale, xs_row, b, b_scale, at_out, out_row)
            else:
                _single(a, x_row, a_scale, xs_row, b, b_scale, at_out, out_row)
        row += height


@kernel(parallel=True)
def gemm(
    data: NDArray[np.uint8],
    parts: NDArray[np.int64],
    codes: NDArray[np.int16],
    scales: NDArray[np.float32],
    out: NDArray[np.float32],
    scratch: NDArray[np.float32],
) -> None:
    """out = X W^T, the weights' outputs one after the other.

    Args:
        data, parts: the arena and a `Linear`'s weights in it.
        codes, scales: `Activations`: (tokens, cols), (tokens, chunks).
        out: (tokens, width) float32.
        scratch: (threads, n) float32; n >= gemm_scratch(tokens).
    """
    tokens, chunks = scales.shape
    blocks = out.shape[1] // LANES
    for pair in prange((blocks + 1) // 2):
        mine = scratch[get_thread_id()]
        totals = mine[: tokens * TILE_LANES].reshape(tokens, TILE_LANES)
        totals[:] = 0
        tile_scales = mine[tokens * TILE_LANES :][: SPAN * TILE_LANES]
        tile = mine[(tokens + SPAN) * TILE_LANES :]
        halves = min(2, blocks - 2 * pair)
        for first in range(0, chunks, SPAN):
            last = min(first + SPAN, chunks)
            for half in range(halves):
                block = 2 * pair + half
                part = parts[find_part(parts, block)]
                to, to_scale = address(tile) + half * LINE, address(tile_scales) + half * LINE
                _unpack(data, part, block, first, last, chunks, to, to_scale)
            x, xs = address(codes) + first * X_CHUNK, address(scales) + 4 * first
            x_row, xs_row = codes.shape[1] * 2, chunks * 4
            to = address(totals)
            _multiply(
                tokens, last - first, x, x_row, xs, xs_row, address(tile), address(tile_scales), to
            )
        width = halves * LANES
        at = pair * TILE_LANES
        for token in range(tokens):
            out[token, at : at + width] = totals[token, :width]
