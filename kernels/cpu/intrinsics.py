"""Vector instructions for the compiled kernels: sixteen 32-bit lanes, one row of a weight in each.

numba has no vector values, so the few operations that the kernels need are emitted as LLVM vector
code. It is generic: LLVM turns it into AVX-512, two AVX2 halves or four NEON quarters. Only the
pair dot product asks for its instruction by name where the processor has it.

Memory is addressed by integers (`address(array) + bytes`), and nothing is checked: the callers are
the kernels of this package, which get their offsets from `layout`.

numba keeps compiled kernels in `__pycache__` and looks at the date of a kernel's own file only: who
edits a function that other files compile in deletes that folder.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.registry import cpu_target
from numba.extending import intrinsic, models, register_model

LANES = 16
CHUNK = 32  # input channels that share one activation scale: one step of every kernel
AHEAD = 8192  # bytes between the memory in use and that asked for
TILE_LANES = 2 * LANES  # rows of a weight (or keys, or head dimensions) that a tile works on

_BYTE, _SHORT, _INT, _LONG = (ir.IntType(bits) for bits in (8, 16, 32, 64))
_HALF, _FLOAT = ir.HalfType(), ir.FloatType()
_FLOATS, _INTS = ir.VectorType(_FLOAT, LANES), ir.VectorType(_INT, LANES)
_CHUNK_FLOATS, _CHUNK_INTS = ir.VectorType(_FLOAT, CHUNK), ir.VectorType(_INT, CHUNK)
_HALVES, _SHORTS = ir.VectorType(_HALF, LANES), ir.VectorType(_SHORT, 2 * LANES)

# Activations lie in this order within every 8 channels, because a shift and a mask give the codes
# of a word in pairs (0, 2), (4, 6), (1, 3), (5, 7); see `layout`.
PAIR_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


class Vector(types.Type):  # type: ignore[misc]
    """A numba type for an LLVM vector."""

    def __init__(self, name: str, lowered: ir.VectorType) -> None:
        self.lowered = lowered
        super().__init__(name=name)


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, manager: Any, vector: Vector) -> None:
        super().__init__(manager, vector, vector.lowered)


float32x16 = Vector("float32x16", _FLOATS)
int32x16 = Vector("int32x16", _INTS)


def _has(feature: str) -> bool:
    """Whether the processor that numba compiles for has a feature; it is in numba's cache key."""
    return f"+{feature}" in str(cpu_target.target_context.codegen().magic_tuple()[2])


def features() -> tuple[str, ...]:
    """Vector extensions in use."""
    return tuple(name for name in ("avx2", "avx512f", "avx512vnni", "neon") if _has(name))


# Rows of a register tile: two vectors for each of them have to fit into the registers.
TILE_ROWS = 12 if _has("avx512f") else 3


# --- LLVM building blocks -------------------------------------------------------------------------


def _load(b: ir.IRBuilder, lowered: ir.Type, at: ir.Value, align: int = 4) -> ir.Value:
    value = b.load(b.inttoptr(at, lowered.as_pointer()))
    value.align = align
    return value


def _store(b: ir.IRBuilder, value: ir.Value, at: ir.Value) -> None:
    b.store(value, b.inttoptr(at, value.type.as_pointer())).align = 4


def _splat(b: ir.IRBuilder, scalar: ir.Value, lowered: ir.VectorType) -> ir.Value:
    single = b.insert_element(ir.Constant(lowered, ir.Undefined), scalar, _INT(0))
    lanes = ir.VectorType(_INT, lowered.count)
    return b.shuffle_vector(single, single, ir.Constant(lanes, [0] * lowered.count))


def _call(b: ir.IRBuilder, name: str, result: ir.Type, args: Sequence[ir.Value]) -> ir.Value:
    signature = ir.FunctionType(result, [arg.type for arg in args])
    return b.call(b.module.declare_intrinsic(name, (), signature), args)


def _prefetch(b: ir.IRBuilder, at: ir.Value) -> None:
    line = b.inttoptr(at, _BYTE.as_pointer())
    _call(b, "llvm.prefetch.p0", ir.VoidType(), [line, _INT(0), _INT(3), _INT(1)])


def _fma(b: ir.IRBuilder, x: ir.Value, y: ir.Value, z: ir.Value) -> ir.Value:
    return _call(b, "llvm.fma.v16f32", _FLOATS, [x, y, z])


def _dot(b: ir.IRBuilder, total: ir.Value, x: ir.Value, y: ir.Value) -> ir.Value:
    """total + x[0] * y[0] + x[1] * y[1] in every 32-bit lane, x and y taken as two int16."""
    x, y = b.bitcast(x, _SHORTS), b.bitcast(y, _SHORTS)
    if _has("avx512vnni"):
        # The saturating form, because LLVM splits the other one into a multiply and an add. No sum
        # here reaches 2^31 (127 * 32767 * 32 < 2^27), so it never saturates.
        return _call(b, "llvm.x86.avx512.vpdpwssds.512", _INTS, [total, x, y])
    wide = ir.VectorType(_INT, 2 * LANES)
    products = b.mul(b.sext(x, wide), b.sext(y, wide))
    even, odd = (ir.Constant(_INTS, [2 * i + first for i in range(LANES)]) for first in (0, 1))
    pairs = b.add(
        b.shuffle_vector(products, products, even), b.shuffle_vector(products, products, odd)
    )
    return b.add(total, pairs)


# --- Operations on one vector ---------------------------------------------------------------------


@intrinsic
def address(typing: Any, array: Any) -> Any:
    """Address of an array's first element; the caller keeps the array alive."""

    def emit(context: Any, b: Any, signature: Any, args: Any) -> ir.Value:
        return b.ptrtoint(context.make_array(signature.args[0])(context, b, args[0]).data, _LONG)

    return types.int64(array), emit


@intrinsic
def zero_floats(typing: Any) -> Any:
    def emit(context: Any, b: Any, signature: Any, args: Any) -> ir.Value:
        return ir.Constant(_FLOATS, [0.0] * LANES)

    return float32x16(), emit


@intrinsic
def zero_ints(typing: Any) -> Any:
    def emit(context: Any, b: Any, signature: Any, args: Any) -> ir.Value:
        return ir.Constant(_INTS, [0] * LANES)

    return int32x16(), emit


@intrinsic
def load_words(typing: Any, at: Any) -> Any:
    """16 words of 32 bits."""

    def emit(context: Any, b: Any, signature: Any, args: Any) -> ir.Value:
        return _load(b, _INTS, args[0])

    return int32x16(types.int64), emit


@intrinsic
def load_halves(typing: Any, at: Any) -> Any:
    """16 float16, as float32."""

    def emit(context: Any, b: Any, signature: Any, args: Any) -> ir.Value:
        return b.fpext(_load(b, _HALVES, args[0], 2), _FLOATS)

    return float32x16(types.int64), emit


@intrinsic
def load_half(typing: Any, at: Any) -> Any:
    """One float16, as float32."""

    def emit(context: Any, b: Any, signature: Any, args: Any) -> ir.Value:
        return b.fpext(_load(b, _HALF, args[0], 2), _FLOAT)

    return types.float32(types.int64), emit


@intrinsic
def splat_word(typing: Any, at: Any) -> Any:
    """The word at an address in every lane."""

    def emit(context: Any, b: Any, signature: Any, args: Any) -> ir.Value:
        return _splat(b, _load(b, _INT, args[0]), _INTS)

    return int32x16(types.int64), emit


@intrinsic
def splat_float(typing: Any, at: Any) -> Any:
    """The float32 at an address in every lane."""

    def emit(context: Any, b: Any, signature: Any, args: Any) -> ir.Value:
        return _splat(b, _load(b, _FLOAT, args[0]), _FLOATS)

    return float32x16(types.int64), emit


@intrinsic
def store_words(typing: Any, at: Any, words: Any) -> Any:
    def emit(context: Any, b: Any, signature: Any, args: Any) -> ir.Value:
        _store(b, args[1], args[0])
        return context.get_dummy_value()

    return types.void(types.int64, int32x16), emit


@intrinsic
def store_floats(typing: Any, at: Any, floats: Any) -> Any:
    def emit(context: Any, b: Any, signature: Any, args: Any) -> ir.Value:
        _store(b, args[1], args[0])
        return context.get_dummy_value()

    return types.void(types.int64, float32x16), emit


@intrinsic
def prefetch(typing: Any, at: Any) -> Any:
    """Ask for the cache line of an address, which need not be a valid one."""

    def emit(context: Any, b: Any, signature: Any, args: Any) -> ir.Value:
        _prefetch(b, args[0])
        return context.get_dummy_value()

    return types.void(types.int64), emit


@intrinsic
def nibble_pair(typing: Any, words: Any, index: Any) -> Any:
    """Nibbles `index` and `index + 4` of every word, 0..15, as two int16."""

    def emit(context: Any, b: Any, signature: Any, args: Any) -> ir.Value:
        shift = b.mul(b.trunc(args[1], _INT), _INT(4))
        shifted = b.lshr(args[0], _splat(b, shift, _INTS))
        return b.and_(shifted, ir.Constant(_INTS, [0x000F000F] * LANES))

    return int32x16(int32x16, types.int64), emit


@intrinsic
def even_bytes(typing: Any, words: Any) -> Any:
    """Bytes 0 and 2 of every word, sign-extended, as two int16."""

    def emit(context: Any, b: Any, signature: Any, args: Any) -> ir.Value:
        eight = ir.Constant(_SHORTS, [8] * 2 * LANES)
        return b.bitcast(b.ashr(b.shl(b.bitcast(args[0], _SHORTS), eight), eight), _INTS)

    return int32x16(int32x16), emit


@intrinsic
def odd_bytes(typing: Any, words: Any) -> Any:
    """Bytes 1 and 3 of every word, sign-extended, as two int16."""

    def emit(context: Any, b: Any, signature: Any, args: Any) -> ir.Value:
        eight = ir.Constant(_SHORTS, [8] * 2 * LANES)
        return b.bitcast(b.ashr(b.bitcast(args[0], _SHORTS), eight), _INTS)

    return int32x16(int32x16), emit


@intrinsic
def subtract_eights(typing: Any, pairs: Any) -> Any:
    """Two int16 of every word, each less 8."""

    def emit(context: Any, b: Any, signature: Any, args: Any) -> ir.Value:
        eight = ir.Constant(_SHORTS, [8] * 2 * LANES)
        return b.bitcast(b.sub(b.bitcast(args[0], _SHORTS), eight), _INTS)

    return int32x16(int32x16), emit


@intrinsic
def dot(typing: Any, total: Any, x: Any, y: Any) -> Any:
    """total + x . y in every lane, x and y as two int16 each."""

    def emit(context: Any, b: Any, signature: Any, args: Any) -> ir.Value:
        return _dot(b, *args)

    return int32x16(int32x16, int32x16, int32x16), emit


@intrinsic
def add(typing: Any, x: Any, y: Any) -> Any:
    def emit(context: Any, b: Any, signature: Any, args: Any) -> ir.Value:
        return b.add(*args)

    return int32x16(int32x16, int32x16), emit


@intrinsic
def scaled(typing: Any, total: Any, ints: Any, x_scale: Any, scale: Any) -> Any:
    """total + ints * (x_scale * scale): the one place that fixes how a chunk is rounded."""

    def emit(context: Any, b: Any, signature: Any, args: Any) -> ir.Value:
        total, ints, x_scale, scale = args
        return _fma(b, b.sitofp(ints, _FLOATS), b.fmul(x_scale, scale), total)

    return float32x16(float32x16, int32x16, float32x16, float32x16), emit


@intrinsic
def quantize_chunk(typing: Any, x: Any, codes: Any) -> Any:
    """32 float32 to int16 in PAIR_ORDER: code = round(x / scale), scale = max |x| / 32767.

    Returns:
        (scale, sum of the codes). The scale of a chunk that holds a NaN is NaN.
    """

    def emit(context: Any, b: Any, signature: Any, args: Any) -> ir.Value:
        values = _load(b, _CHUNK_FLOATS, args[0])
        # Sizes compare alike as floats and as integers, but as an integer a NaN is the greatest.
        sizes = b.and_(
            b.bitcast(values, _CHUNK_INTS), ir.Constant(_CHUNK_INTS, [0x7FFFFFFF] * CHUNK)
        )
        peak = b.bitcast(_call(b, "llvm.vector.reduce.smax.v32i32", _INT, [sizes]), _FLOAT)
        zero = b.fcmp_ordered("==", peak, _FLOAT(0.0))
        factor = b.select(zero, _FLOAT(0.0), b.fdiv(_FLOAT(32767.0), peak))
        scaled = b.fmul(values, _splat(b, factor, _CHUNK_FLOATS))
        ints = _call(b, "llvm.lrint.v32i32.v32f32", _CHUNK_INTS, [scaled])
        shorts = b.trunc(ints, _SHORTS)
        order = [first + channel for first in range(0, CHUNK, 8) for channel in PAIR_ORDER]
        _store(b, b.shuffle_vector(shorts, shorts, ir.Constant(_CHUNK_INTS, order)), args[1])
        total = _call(b, "llvm.vector.reduce.add.v32i32", _INT, [ints])
        scale = b.fmul(peak, _FLOAT(1 / 32767))
        return context.make_tuple(b, signature.return_type, [scale, total])

    return types.Tuple((types.float32, types.int32))(types.int64, types.int64), emit


# --- Register tiles -------------------------------------------------------------------------------
# A tile multiplies R rows with TILE_LANES lanes: two vectors of lanes for every row are held in
# registers while the inner dimension runs. Every row is computed as if it were alone.


def _accumulate(
    b: ir.IRBuilder,
    cells: int,
    lowered: ir.VectorType,
    count: ir.Value,
    step: Callable[[ir.Value, list[ir.Value]], list[ir.Value]],
    start: list[ir.Value],
) -> list[ir.Value]:
    """for i in range(count): cells = step(i, cells). LLVM keeps the cells in registers."""
    slots = [cgutils.alloca_once(b, lowered) for _ in range(cells)]
    for slot, value in zip(slots, start, strict=True):
        b.store(value, slot)
    with cgutils.for_range(b, count) as loop:
        values = step(loop.index, [b.load(slot) for slot in slots])
        for slot, value in zip(slots, values, strict=True):
            b.store(value, slot)
    return [b.load(slot) for slot in slots]


def _at(b: ir.IRBuilder, base: ir.Value, stride: ir.Value, index: int) -> ir.Value:
    return b.add(base, b.mul(stride, _LONG(index)))


def float_tile(rows: int) -> Any:
    """out[r, lane] += sum over i of x[r, i] * w[i, lane], in float32.

    Args of the result, all int64: address of x and bytes between its rows; address of w, bytes
    between its steps and their number; address of out and bytes between its rows.
    """

    @intrinsic
    def tile(
        typing: Any, x: Any, x_row: Any, w: Any, w_step: Any, count: Any, out: Any, out_row: Any
    ) -> Any:
        def emit(context: Any, b: Any, signature: Any, args: Any) -> ir.Value:
            x, x_row, w, w_step, count, out, out_row = args
            xs = [_at(b, x, x_row, r) for r in range(rows)]
            outs = [_at(b, out, out_row, r) for r in range(rows)]
            cells = [(at, b.add(at, _LONG(4 * LANES))) for at in outs]
            flat = [at for pair in cells for at in pair]

            def step(i: ir.Value, values: list[ir.Value]) -> list[ir.Value]:
                here = b.add(w, b.mul(i, w_step))
                lines = [b.add(here, _LONG(4 * LANES * n)) for n in range(2)]
                lanes = [_load(b, _FLOATS, at) for at in lines]
                for at in lines:
                    _prefetch(b, b.add(at, _LONG(AHEAD)))
                result = []
                for r in range(rows):
                    xi = _load(b, _FLOAT, b.add(xs[r], b.mul(i, _LONG(4))))
                    factor = _splat(b, xi, _FLOATS)
                    result += [_fma(b, factor, lanes[n], values[2 * r + n]) for n in range(2)]
                return result

            start = [_load(b, _FLOATS, at) for at in flat]
            totals = _accumulate(b, 2 * rows, _FLOATS, count, step, start)
            for at, value in zip(flat, totals, strict=True):
                _store(b, value, at)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 7), emit

    return tile


def chunk_tile(rows: int) -> Any:
    """One chunk of a matrix product: out[r, lane] += x_scale[r] * scale[lane] * dot(x[r], w[lane]).

    Args of the result, all int64: address of x (int16 pairs, one chunk) and bytes between its rows;
    address of the x scales (float32) and bytes between rows; address of w (int16 pairs by
    `TILE_LANES` lanes) and of its float32 scales; address of out and bytes between its rows.
    """

    @intrinsic
    def tile(
        typing: Any,
        x: Any,
        x_row: Any,
        x_scale: Any,
        x_scale_row: Any,
        w: Any,
        scale: Any,
        out: Any,
        out_row: Any,
    ) -> Any:
        def emit(context: Any, b: Any, signature: Any, args: Any) -> ir.Value:
            x, x_row, x_scale, x_scale_row, w, scale, out, out_row = args
            vector = _LONG(4 * LANES)

            def step(i: ir.Value, values: list[ir.Value]) -> list[ir.Value]:
                here = b.add(w, b.mul(i, _LONG(8 * LANES)))
                lanes = [_load(b, _INTS, at) for at in (here, b.add(here, vector))]
                result = []
                for r in range(rows):
                    pair = _load(b, _INT, b.add(_at(b, x, x_row, r), b.mul(i, _LONG(4))))
                    factor = _splat(b, pair, _INTS)
                    result += [_dot(b, values[2 * r + n], lanes[n], factor) for n in (0, 1)]
                return result

            start = [ir.Constant(_INTS, [0] * LANES)] * (2 * rows)
            dots = start
            for pair in range(CHUNK // 2):
                dots = step(_LONG(pair), dots)
            scales = [_load(b, _FLOATS, at) for at in (scale, b.add(scale, vector))]
            for r in range(rows):
                xs = _splat(b, _load(b, _FLOAT, _at(b, x_scale, x_scale_row, r)), _FLOATS)
                for n in range(2):
                    at = b.add(_at(b, out, out_row, r), _LONG(4 * LANES * n))
                    ints = b.sitofp(dots[2 * r + n], _FLOATS)
                    total = _fma(b, ints, b.fmul(xs, scales[n]), _load(b, _FLOATS, at))
                    _store(b, total, at)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 8), emit

    return tile
