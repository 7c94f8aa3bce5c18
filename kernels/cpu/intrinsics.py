"""Vector instructions for the compiled kernels: sixteen 32-bit lanes, one row of a weight in each.

numba has no vector values; these functions give its code the few that the kernels need. Memory is
addressed by integers (`address(array) + bytes`), and nothing is checked: the callers are the
kernels of this package, which get their offsets from `layout`.

numba keeps compiled kernels in `__pycache__` and looks at the date of a kernel's own file only: who
edits a function that other files compile in deletes that folder.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic, models, register_model

from uq.kernels.cpu import llvm
from uq.kernels.cpu.llvm import CHUNK, LANES

# Activations lie in this order within every 8 channels, because a shift and a mask give the codes
# of a word in pairs (0, 2), (4, 6), (1, 3), (5, 7); see `layout`.
PAIR_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


class Vector(types.Type):  # type: ignore[misc]
    """A numba type for an LLVM vector."""

    def __init__(self, name: str, lowered: ir.VectorType) -> None:
        self.lowered = lowered
        super().__init__(name=name)


@register_model(Vector)
class VectorModel(models.PrimitiveModel):  # type: ignore[misc]
    """A vector is passed as it is."""

    def __init__(self, manager: Any, vector: Vector) -> None:
        super().__init__(manager, vector, vector.lowered)


float32x16 = Vector("float32x16", llvm.FLOATS)
int32x16 = Vector("int32x16", llvm.INTS)


@intrinsic
def address(typing: Any, array: Any) -> Any:
    """Address of an array's first element; the caller keeps the array alive."""

    def emit(context: Any, b: Any, signature: Any, args: Any) -> ir.Value:
        return b.ptrtoint(
            context.make_array(signature.args[0])(context, b, args[0]).data, llvm.LONG
        )

    return types.int64(array), emit


@intrinsic
def zero_floats(typing: Any) -> Any:
    def emit(context: Any, b: Any, signature: Any, args: Any) -> ir.Value:
        return ir.Constant(llvm.FLOATS, [0.0] * LANES)

    return float32x16(), emit


@intrinsic
def zero_ints(typing: Any) -> Any:
    def emit(context: Any, b: Any, signature: Any, args: Any) -> ir.Value:
        return ir.Constant(llvm.INTS, [0] * LANES)

    return int32x16(), emit


@intrinsic
def load_halves(typing: Any, at: Any) -> Any:
    """16 float16, as float32."""

    def emit(context: Any, b: Any, signature: Any, args: Any) -> ir.Value:
        return b.fpext(llvm.load(b, llvm.HALVES, args[0], 2), llvm.FLOATS)

    return float32x16(types.int64), emit


@intrinsic
def load_multiples(typing: Any, at: Any, steps: Any) -> Any:
    """16 signed bytes, each times the step of its lane."""

    def emit(context: Any, b: Any, signature: Any, args: Any) -> ir.Value:
        at, steps = args
        return b.fmul(b.sitofp(llvm.load(b, llvm.BYTES, at), llvm.FLOATS), steps)

    return float32x16(types.int64, float32x16), emit


@intrinsic
def load_byte(typing: Any, at: Any) -> Any:
    """One signed byte, as float32."""

    def emit(context: Any, b: Any, signature: Any, args: Any) -> ir.Value:
        return b.sitofp(llvm.load(b, llvm.BYTE, args[0], 1), llvm.FLOAT)

    return types.float32(types.int64), emit


@intrinsic
def load_nibbles(typing: Any, at: Any, shift: Any) -> Any:
    """16 unsigned nibbles, as int32 times 2^shift."""

    def emit(context: Any, b: Any, signature: Any, args: Any) -> ir.Value:
        at, shift = args
        both = llvm.load(b, ir.VectorType(llvm.INT, 2), at)
        lanes = ir.VectorType(llvm.INT, LANES)
        halves = ir.Constant(lanes, [lane // 8 for lane in range(LANES)])
        words = b.shuffle_vector(both, both, halves)
        shifts = ir.Constant(llvm.INTS, [4 * (lane % 8) for lane in range(LANES)])
        nibbles = b.and_(b.lshr(words, shifts), ir.Constant(llvm.INTS, [15] * LANES))
        return b.shl(nibbles, llvm.splat(b, b.trunc(shift, llvm.INT), llvm.INTS))

    return int32x16(types.int64, types.int64), emit


@intrinsic
def load_half(typing: Any, at: Any) -> Any:
    """One float16, as float32."""

    def emit(context: Any, b: Any, signature: Any, args: Any) -> ir.Value:
        return b.fpext(llvm.load(b, llvm.HALF, args[0], 2), llvm.FLOAT)

    return types.float32(types.int64), emit


@intrinsic
def splat_int(typing: Any, value: Any) -> Any:
    """An integer in every lane."""

    def emit(context: Any, b: Any, signature: Any, args: Any) -> ir.Value:
        return llvm.splat(b, b.trunc(args[0], llvm.INT), llvm.INTS)

    return int32x16(types.int64), emit


@intrinsic
def splat_word(typing: Any, at: Any) -> Any:
    """The word at an address in every lane."""

    def emit(context: Any, b: Any, signature: Any, args: Any) -> ir.Value:
        return llvm.splat(b, llvm.load(b, llvm.INT, args[0]), llvm.INTS)

    return int32x16(types.int64), emit


@intrinsic
def splat_float(typing: Any, at: Any) -> Any:
    """The float32 at an address in every lane."""

    def emit(context: Any, b: Any, signature: Any, args: Any) -> ir.Value:
        return llvm.splat(b, llvm.load(b, llvm.FLOAT, args[0]), llvm.FLOATS)

    return float32x16(types.int64), emit


@intrinsic
def store_floats(typing: Any, at: Any, floats: Any) -> Any:
    def emit(context: Any, b: Any, signature: Any, args: Any) -> ir.Value:
        llvm.store(b, args[1], args[0])
        return context.get_dummy_value()

    return types.void(types.int64, float32x16), emit


@intrinsic
def multiply(typing: Any, x: Any, y: Any) -> Any:
    def emit(context: Any, b: Any, signature: Any, args: Any) -> ir.Value:
        return b.mul(*args)

    return int32x16(int32x16, int32x16), emit


@intrinsic
def eighth(typing: Any, x: Any) -> Any:
    """Multiples of 8, divided by it."""

    def emit(context: Any, b: Any, signature: Any, args: Any) -> ir.Value:
        return b.ashr(args[0], ir.Constant(llvm.INTS, [3] * LANES))

    return int32x16(int32x16), emit


@intrinsic
def scaled(typing: Any, total: Any, ints: Any, x_scale: Any, scale: Any) -> Any:
    """total + ints * (x_scale * scale): the one place that fixes how a chunk is rounded."""

    def emit(context: Any, b: Any, signature: Any, args: Any) -> ir.Value:
        total, ints, x_scale, scale = args
        return llvm.fma(b, b.sitofp(ints, llvm.FLOATS), b.fmul(x_scale, scale), total)

    return float32x16(float32x16, int32x16, float32x16, float32x16), emit


@intrinsic
def quantize_chunk(typing: Any, x: Any, codes: Any) -> Any:
    """32 float32 to int16 in PAIR_ORDER: code = round(x / scale), scale = max |x| / 32767.

    Returns:
        (scale, sum of the codes). The scale of a chunk that holds a NaN is NaN.
    """

    def emit(context: Any, b: Any, signature: Any, args: Any) -> ir.Value:
        values = llvm.load(b, llvm.CHUNK_FLOATS, args[0])
        # Sizes compare alike as floats and as integers, but as an integer a NaN is the greatest.
        unsigned = ir.Constant(llvm.CHUNK_INTS, [0x7FFFFFFF] * CHUNK)
        sizes = b.and_(b.bitcast(values, llvm.CHUNK_INTS), unsigned)
        size = llvm.call(b, "llvm.vector.reduce.smax.v32i32", llvm.INT, [sizes])
        peak = b.bitcast(size, llvm.FLOAT)
        zero = b.fcmp_ordered("==", peak, llvm.FLOAT(0.0))
        factor = b.select(zero, llvm.FLOAT(0.0), b.fdiv(llvm.FLOAT(32767.0), peak))
        scaled = b.fmul(values, llvm.splat(b, factor, llvm.CHUNK_FLOATS))
        ints = llvm.call(b, "llvm.lrint.v32i32.v32f32", llvm.CHUNK_INTS, [scaled])
        shorts = b.trunc(ints, llvm.SHORTS)
        channels = [first + channel for first in range(0, CHUNK, 8) for channel in PAIR_ORDER]
        order = ir.Constant(llvm.CHUNK_INTS, channels)
        llvm.store(b, b.shuffle_vector(shorts, shorts, order), args[1])
        total = llvm.call(b, "llvm.vector.reduce.add.v32i32", llvm.INT, [ints])
        scale = b.fmul(peak, llvm.FLOAT(1 / 32767))
        return context.make_tuple(b, signature.return_type, [scale, total])

    return types.Tuple((types.float32, types.int32))(types.int64, types.int64), emit
