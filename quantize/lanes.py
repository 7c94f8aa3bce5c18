"""The innermost loop of the search for scales, in LLVM's vectors.

Written as loops over an array, the sums of the candidates go through memory for every weight: the
compiler cannot know that they lie apart from the weights, and rounding takes two steps more. Here
sums stay in registers, and a number that MAGIC is added to has no digits left behind the point.
Fused products in a fixed order: every processor gives the same bits.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core.cgutils import get_or_insert_function
from numba.extending import intrinsic

WIDTH = 8  # floats of a vector
LANES = 24  # three vectors
FLOAT = ir.FloatType()
VECTOR = ir.VectorType(FLOAT, WIDTH)
MAGIC = 1.5 * 2**23  # float32 beside it are whole numbers


@intrinsic
def candidate_sums(
    _typing: Any,
    w: Any,
    a: Any,
    start: Any,
    stop: Any,
    inverse: Any,
    low: Any,
    high: Any,
    sums: Any,
) -> Any:
    """For each lane k: S1 = sum(a c x), S2 = sum(a c^2), x = w inverse, c = clip(rint(x step)),
    where |x step| < 2**22.

    Args:
        w, a: (n,) float32, C order, of which `start:stop`, int64, counts and is not empty.
        inverse, low, high: float32.
        sums: (4 lanes,) float32: S1, S2, S1^2 / S2, which are written, and the steps; `LANES`.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        arrays = {
            i: context.make_array(signature.args[i])(context, builder, args[i]) for i in (0, 1, 7)
        }
        _emit(builder, arrays[0], arrays[1], args[2:7], arrays[7])
        return context.get_dummy_value()

    return types.void(w, a, start, stop, inverse, low, high, sums), codegen


def _emit(builder: Any, w: Any, a: Any, scalars: Any, sums: Any) -> None:
    start, stop, inverse, low, high = scalars
    index = start.type
    vectors = [_vector(builder, sums.data, index, place) for place in range(12)]
    steps = [builder.load(pointer, align=4) for pointer in vectors[9:]]
    lows, highs = _splat(builder, low), _splat(builder, high)
    zero = ir.Constant(VECTOR, [0.0] * WIDTH)

    before, loop = builder.block, builder.append_basic_block("weights")
    builder.branch(loop)
    builder.position_at_end(loop)
    i = builder.phi(index)
    i.add_incoming(start, before)
    totals = [builder.phi(VECTOR) for _ in range(6)]
    for total in totals:
        total.add_incoming(zero, before)
    x = _splat(builder, builder.fmul(builder.load(builder.gep(w.data, [i])), inverse))
    importance = _splat(builder, builder.load(builder.gep(a.data, [i])))
    magic = ir.Constant(VECTOR, [MAGIC] * WIDTH)
    fused = ir.FunctionType(VECTOR, [VECTOR] * 3)
    fma = get_or_insert_function(builder.module, fused, f"llvm.fma.v{WIDTH}f32")
    added: list[Any] = [None] * 6
    for k, step in enumerate(steps):
        code = builder.fsub(builder.call(fma, [x, step, magic]), magic)
        code = builder.select(builder.fcmp_ordered(">", code, lows), code, lows)
        code = builder.select(builder.fcmp_ordered("<", code, highs), code, highs)
        weighted = builder.fmul(importance, code)
        added[k] = builder.call(fma, [weighted, x, totals[k]])
        added[3 + k] = builder.call(fma, [weighted, code, totals[3 + k]])
    following = builder.add(i, ir.Constant(index, 1))
    i.add_incoming(following, loop)
    for total, value in zip(totals, added, strict=True):
        total.add_incoming(value, loop)
    behind = builder.append_basic_block("summed")
    builder.cbranch(builder.icmp_signed("<", following, stop), loop, behind)
    builder.position_at_end(behind)
    fits = [
        builder.fdiv(builder.fmul(s1, s1), s2) for s1, s2 in zip(added[:3], added[3:], strict=True)
    ]
    for pointer, value in zip(vectors[:9], [*added, *fits], strict=True):
        builder.store(value, pointer, align=4)


def _vector(builder: Any, data: Any, index: Any, place: int) -> Any:
    """Pointer to the vector `place` of an array of floats."""
    pointer = builder.gep(data, [ir.Constant(index, place * WIDTH)])
    return builder.bitcast(pointer, VECTOR.as_pointer())


def _splat(builder: Any, value: Any) -> Any:
    """The same number in every lane."""
    empty = ir.Constant(VECTOR, ir.Undefined)
    first = builder.insert_element(empty, value, ir.Constant(ir.IntType(32), 0))
    same = ir.Constant(ir.VectorType(ir.IntType(32), WIDTH), [0] * WIDTH)
    return builder.shuffle_vector(first, empty, same)
