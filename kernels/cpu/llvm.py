"""LLVM building blocks of the vector instructions: types, memory, and the pair dot product.

The code is generic: LLVM turns it into AVX-512, two AVX2 halves or four NEON quarters. Only the dot
product asks for its instruction by name where the processor has it.
"""

from __future__ import annotations

from collections.abc import Sequence

from llvmlite import ir
from numba.core.registry import cpu_target

LANES = 16  # 32-bit lanes of a vector
CHUNK = 32  # input channels that share one activation scale: one step of every kernel
AHEAD = 8192  # bytes between the memory in use and that asked for

BYTE, SHORT, INT, LONG = (ir.IntType(bits) for bits in (8, 16, 32, 64))
HALF, FLOAT = ir.HalfType(), ir.FloatType()
FLOATS, INTS = ir.VectorType(FLOAT, LANES), ir.VectorType(INT, LANES)
HALVES, SHORTS = ir.VectorType(HALF, LANES), ir.VectorType(SHORT, 2 * LANES)
BYTES = ir.VectorType(ir.IntType(8), LANES)
CHUNK_FLOATS, CHUNK_INTS = ir.VectorType(FLOAT, CHUNK), ir.VectorType(INT, CHUNK)


def has(feature: str) -> bool:
    """Whether the processor that numba compiles for has a feature; it is in numba's cache key."""
    return f"+{feature}" in str(cpu_target.target_context.codegen().magic_tuple()[2])


def features() -> tuple[str, ...]:
    """Vector extensions in use."""
    return tuple(name for name in ("avx2", "avx512f", "avx512vnni", "neon") if has(name))


def load(b: ir.IRBuilder, lowered: ir.Type, at: ir.Value, align: int = 4) -> ir.Value:
    value = b.load(b.inttoptr(at, lowered.as_pointer()))
    value.align = align
    return value


def store(b: ir.IRBuilder, value: ir.Value, at: ir.Value) -> None:
    b.store(value, b.inttoptr(at, value.type.as_pointer())).align = 4


def splat(b: ir.IRBuilder, scalar: ir.Value, lowered: ir.VectorType) -> ir.Value:
    """A scalar in every lane."""
    single = b.insert_element(ir.Constant(lowered, ir.Undefined), scalar, INT(0))
    lanes = ir.VectorType(INT, lowered.count)
    return b.shuffle_vector(single, single, ir.Constant(lanes, [0] * lowered.count))


def call(b: ir.IRBuilder, name: str, result: ir.Type, args: Sequence[ir.Value]) -> ir.Value:
    """Call an LLVM intrinsic by its full name."""
    signature = ir.FunctionType(result, [arg.type for arg in args])
    return b.call(b.module.declare_intrinsic(name, (), signature), args)


def prefetch(b: ir.IRBuilder, at: ir.Value) -> None:
    """Ask for the cache line of an address, which need not be a valid one."""
    line = b.inttoptr(at, BYTE.as_pointer())
    call(b, "llvm.prefetch.p0", ir.VoidType(), [line, INT(0), INT(3), INT(1)])


def fma(b: ir.IRBuilder, x: ir.Value, y: ir.Value, z: ir.Value) -> ir.Value:
    return call(b, "llvm.fma.v16f32", FLOATS, [x, y, z])


def dot(b: ir.IRBuilder, total: ir.Value, x: ir.Value, y: ir.Value) -> ir.Value:
    """total + x[0] * y[0] + x[1] * y[1] in every 32-bit lane, x and y taken as two int16."""
    x, y = b.bitcast(x, SHORTS), b.bitcast(y, SHORTS)
    if has("avx512vnni"):
        # The saturating form, because LLVM splits the other one into a multiply and an add. No sum
        # here reaches 2^31 (127 * 32767 * 32 < 2^27), so it never saturates.
        return call(b, "llvm.x86.avx512.vpdpwssds.512", INTS, [total, x, y])
    wide = ir.VectorType(INT, 2 * LANES)
    products = b.mul(b.sext(x, wide), b.sext(y, wide))
    even, odd = (ir.Constant(INTS, [2 * i + first for i in range(LANES)]) for first in (0, 1))
    pairs = b.add(
        b.shuffle_vector(products, products, even), b.shuffle_vector(products, products, odd)
    )
    return b.add(total, pairs)
