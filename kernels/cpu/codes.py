"""The codes of one chunk, 16 rows x 32 channels, out of their bits: for both matrix products.

`pairs` is written once for every width; LLVM gets it unrolled, in the order of the memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from uq.kernels.cpu import llvm
from uq.kernels.cpu.intrinsics import int32x16
from uq.kernels.cpu.llvm import AHEAD, LANES

LINE = 4 * LANES  # bytes of a vector
PAIR_BYTES = 4  # two int16
LOW_WORDS = 4  # of nibbles, in each lane of a chunk


def chunk_dot(bits: int) -> Any:
    """start + 16 dot products over 32 channels.

    Args of the result: address of the codes and of x (32 int16 in PAIR_ORDER), both int64, and
    start, int32x16. Codes are taken as they are stored: less `qmin`, but INT8's, which are signed.
    """

    @intrinsic
    def dot(typing: Any, codes: Any, x: Any, start: Any) -> Any:
        def emit(context: Any, b: Any, signature: Any, args: Any) -> ir.Value:
            codes, x, start = args
            totals = [start, ir.Constant(llvm.INTS, [0] * LANES)]  # two chains of additions
            for count, (pair, values) in enumerate(_pairs(b, codes, bits, prefetch=True)):
                at = b.add(x, llvm.LONG(PAIR_BYTES * pair))
                factor = llvm.splat(b, llvm.load(b, llvm.INT, at), llvm.INTS)
                totals[count % 2] = llvm.dot(b, totals[count % 2], factor, values)
            return b.add(*totals)

        return int32x16(types.int64, types.int64, int32x16), emit

    return dot


def chunk_unpack(bits: int, step: int) -> Any:
    """Store the codes of a chunk, less their zero points, as int16 pairs in PAIR_ORDER.

    Args of the result: address of the codes, int64; zero points less `qmin`, int32x16 (not used for
    INT8); where the first pair of the 16 rows goes, int64. The next follows `step` bytes
    behind it.
    """

    @intrinsic
    def unpack(typing: Any, codes: Any, zero: Any, out: Any) -> Any:
        def emit(context: Any, b: Any, signature: Any, args: Any) -> ir.Value:
            codes, zero, out = args
            both = b.bitcast(b.or_(zero, b.shl(zero, _splat(16))), llvm.SHORTS)
            for pair, values in _pairs(b, codes, bits):
                shorts = b.bitcast(values, llvm.SHORTS)
                level = shorts if bits == 8 else b.sub(shorts, both)
                llvm.store(b, level, b.add(out, llvm.LONG(step * pair)))
            return context.get_dummy_value()

        return types.void(types.int64, int32x16, types.int64), emit

    return unpack


def _pairs(
    b: ir.IRBuilder, at: ir.Value, bits: int, prefetch: bool = False
) -> Iterator[tuple[int, ir.Value]]:
    """Number in PAIR_ORDER and values, two int16 in each lane, of the 16 pairs of a chunk."""

    def words(line: int) -> ir.Value:
        place = b.add(at, llvm.LONG(LINE * line))
        if prefetch:
            llvm.prefetch(b, b.add(place, llvm.LONG(AHEAD)))
        return llvm.load(b, llvm.INTS, place)

    if bits == 8:
        for word in range(2 * LOW_WORDS):
            pair, shorts = 4 * (word // 2) + word % 2, b.bitcast(words(word), llvm.SHORTS)
            yield pair, b.bitcast(b.ashr(b.shl(shorts, _shorts(8)), _shorts(8)), llvm.INTS)
            yield pair + 2, b.bitcast(b.ashr(shorts, _shorts(8)), llvm.INTS)
        return
    above = [words(LOW_WORDS + line) for line in range(bits - 4)]
    for word in range(LOW_WORDS):
        nibbles = words(word)
        for index in range(4):
            values = b.and_(b.lshr(nibbles, _splat(4 * index)), _splat(0x000F000F))
            if above:
                values = b.or_(values, _high_bits(b, above, word, index))
            yield 4 * word + index, values


def _high_bits(b: ir.IRBuilder, above: list[ir.Value], word: int, index: int) -> ir.Value:
    """Bits 4 and up of pair `index` of a word of nibbles: fields of `formats.pack.pack_fields`."""
    width = len(above)
    first = width * (2 * word + index % 2)  # of the run of four codes
    shift = first % 8 + 8 * (index // 2)
    field = b.lshr(above[first // 8], _splat(shift))
    mask = ((1 << width) - 1) * 0x00010001
    return b.shl(b.and_(field, _splat(mask)), _splat(4))


def _splat(value: int) -> ir.Constant:
    return ir.Constant(llvm.INTS, [value] * LANES)


def _shorts(value: int) -> ir.Constant:
    return ir.Constant(llvm.SHORTS, [value] * 2 * LANES)
