"""One token times any number of weights that share its input: the kernels of decoding.

Activations are 16-bit fixed point with one float32 scale for every 32 channels (an error of at most
2^-16 of the chunk's largest value), so a chunk's dot product is exact in int32 and `gemm` gets the
same bits in another order of work. Codes are stored less the lowest one, so a chunk's sum begins
with what its zero point takes away: minus the zero point times the sum of the activations. Decoding
is bound by memory: a block's codes are one stream, asked for well before they are needed.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import prange
from numpy.typing import NDArray

from uq.kernels.cpu.codes import LINE, chunk_dot
from uq.kernels.cpu.intrinsics import (
    address,
    eighth,
    load_halves,
    load_multiples,
    load_nibbles,
    multiply,
    scaled,
    splat_float,
    splat_int,
    splat_word,
    store_floats,
    zero_floats,
    zero_ints,
)
from uq.kernels.cpu.layout import (
    BITS,
    BLOCKS,
    CHUNKS_PER_GROUP,
    CODES,
    FIRST_BLOCK,
    GROUP_BYTES,
    SCALES,
    STEP_BYTES,
    ZERO_BYTES,
)
from uq.kernels.cpu.llvm import LANES
from uq.kernels.elementwise import kernel

X_CHUNK = 64  # bytes of 32 int16


@kernel()
def find_part(parts: NDArray[np.int64], block: int) -> int:
    """The weight that row block `block` of a `Linear` belongs to."""
    part = 0
    while block >= parts[part, FIRST_BLOCK] + parts[part, BLOCKS]:
        part += 1
    return part


@kernel()
def has_zeros(group_bytes: int) -> bool:
    """Whether there are zero points behind the scales of a group."""
    return group_bytes % LANES != 0


@kernel()
def load_zeros(group: int, group_bytes: int, bits: int) -> Any:
    """Zero points of 16 rows, counted from `qmin`, out of a group's scales and zero points."""
    if not has_zeros(group_bytes):
        return splat_int(1 << (bits - 1))
    return load_nibbles(group + group_bytes - ZERO_BYTES, bits - 4)


@kernel()
def load_scales(group: int, steps: Any, step_bytes: int) -> Any:
    """Scales of 16 rows. Those of 8 bits are exactly float16 numbers, too: see `row_scales`."""
    if step_bytes:
        return load_multiples(group, steps)
    return load_halves(group)


def _loop_kernel(bits: int, zero_point: bool) -> Any:
    """16 rows times one token, for codes of one kind."""
    dot, step, eights = chunk_dot(bits), bits * LINE, (1 << (bits - 1)) // 8

    @kernel(cache=False)  # part of `gemv`, which is kept
    def loop(
        codes: int,
        group: int,
        group_bytes: int,
        step_bytes: int,
        groups: int,
        per_group: int,
        x: int,
        x_scale: int,
        offset: int,
    ) -> Any:
        total, steps = zero_floats(), load_halves(group)  # of scales of 16 bits: not used
        group += step_bytes
        for _ in range(groups):
            scale = load_scales(group, steps, step_bytes)
            zeros = load_zeros(group, group_bytes, bits)
            for _ in range(per_group):
                start = zero_ints()
                if zero_point:
                    start = eighth(multiply(zeros, splat_word(offset)))
                elif bits < 8:
                    start = multiply(splat_int(eights), splat_word(offset))
                total = scaled(total, dot(codes, x, start), splat_float(x_scale), scale)
                codes, x, x_scale, offset = codes + step, x + X_CHUNK, x_scale + 4, offset + 4
            group += group_bytes
        return total

    return loop


def _block_kernel(bits: int) -> Any:
    """16 rows times one token, for codes of one width."""
    symmetric, with_zeros = (_loop_kernel(bits, zeros and bits < 8) for zeros in (False, True))

    @kernel(cache=False)
    def block(
        codes: int,
        group: int,
        sizes: tuple[int, int],
        groups: int,
        per_group: int,
        x: int,
        x_scale: int,
        offset: int,
    ) -> Any:
        if has_zeros(sizes[0]):
            return with_zeros(codes, group, *sizes, groups, per_group, x, x_scale, offset)
        return symmetric(codes, group, *sizes, groups, per_group, x, x_scale, offset)

    return block


_int4, _int5, _int6, _int8 = map(_block_kernel, (4, 5, 6, 8))


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
        sizes = part[GROUP_BYTES], part[STEP_BYTES]
        groups, inner = chunks // per_group, block - part[FIRST_BLOCK]
        at = address(data) + part[CODES] + inner * chunks * bits * LINE
        group = address(data) + part[SCALES] + inner * (sizes[1] + groups * sizes[0])
        if bits == 4:
            total = _int4(at, group, sizes, groups, per_group, x, x_scale, offset)
        elif bits == 5:
            total = _int5(at, group, sizes, groups, per_group, x, x_scale, offset)
        elif bits == 6:
            total = _int6(at, group, sizes, groups, per_group, x, x_scale, offset)
        else:
            total = _int8(at, group, sizes, groups, per_group, x, x_scale, offset)
        store_floats(address(out) + block * LINE, total)
