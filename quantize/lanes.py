"""The innermost loops of the search for scales, in LLVM's vectors: 16 groups at a time, one in each
lane.

A vector holds the same place of 16 groups, so sums over a group need no reduction and keep their
order; they stay in registers, which a compiler cannot do for arrays that may overlap. Four
candidates share the loads of a weight. A number that MAGIC is added to has no digits left behind
the point. Fused products in a fixed order: every processor gives the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from uq.kernels.cpu.llvm import FLOATS, INTS, LANES, LONG, call, fma, load, splat
from uq.quantize.vectors import (
    address,
    clip,
    floats,
    ints,
    loop,
    place_of,
    row_addresses,
    splat_at,
    store,
    transposed,
)

CANDIDATES = 19  # of a symmetric grid
TOGETHER = 4  # candidates whose sums are in registers at the same time
MAGIC = 1.5 * 2**23  # float32 beside it are whole numbers
UNSIGNED = 0x7FFFFFFF
DOUBLES = ir.VectorType(ir.DoubleType(), LANES)
BYTES = ir.VectorType(ir.IntType(8), LANES)

__all__ = ["CANDIDATES", "LANES", "best_scales", "largest_lanes", "round_lanes", "rows_to_lanes"]


@intrinsic
def rows_to_lanes(_typing: Any, bits: Any, row: Any, col: Any, n: Any, w: Any) -> Any:
    """Columns `col:col + n` of `LANES` rows, each row in a lane.

    Args:
        bits: (rows, cols) of float32 as int32, or of bfloat16 as uint16, C order.
        n: a multiple of LANES, n > 0.
        w: (n, LANES) int32, out: bits of float32.
    """
    width = bits.dtype.bitwidth

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        rows = row_addresses(context, b, signature, args, 0)
        out = address(context, b, signature, args, 4)

        def turn(i: Any, _: Sequence[Any]) -> list[Any]:
            place = b.mul(i, LONG(LANES))
            offset = b.mul(b.add(args[2], place), LONG(width // 8))
            stored = ir.VectorType(ir.IntType(width), LANES)
            found = [load(b, stored, b.add(row, offset), align=1) for row in rows]
            if width < 32:
                found = [b.shl(b.zext(each, INTS), ints(32 - width)) for each in found]
            for lane, vector in enumerate(transposed(b, found)):
                store(b, vector, place_of(b, out, b.add(place, LONG(lane))))
            return []

        loop(b, b.sdiv(args[3], LONG(LANES)), [], turn)
        return context.get_dummy_value()

    return types.void(bits, row, col, n, w), codegen


@intrinsic
def largest_lanes(_typing: Any, w: Any, n: Any, largest: Any) -> Any:
    """In each lane the number of the largest magnitude, the positive one of two.

    By integers: without their sign they order like the magnitudes, with it positive ones order
    like the numbers.

    Args:
        w: (n, LANES) float32, finite, n > 0.
        largest: (LANES,) float32, out.
    """

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        values, out = (address(context, b, signature, args, i) for i in (0, 2))

        def compare(i: Any, most: Sequence[Any]) -> list[Any]:
            bits = load(b, INTS, place_of(b, values, i))
            found = (b.and_(bits, ints(UNSIGNED)), bits)
            return [
                b.select(b.icmp_signed(">", new, old), new, old)
                for new, old in zip(found, most, strict=True)
            ]

        magnitude, positive = loop(b, args[1], [ints(0), ints(0)], compare)
        sign = b.select(b.icmp_signed("==", positive, magnitude), ints(0), ints(UNSIGNED + 1))
        store(b, b.bitcast(b.or_(magnitude, sign), FLOATS), out)
        return context.get_dummy_value()

    return types.void(w, n, largest), codegen


@intrinsic
def best_scales(
    _typing: Any,
    w: Any,
    a: Any,
    n: Any,
    steps: Any,
    low: Any,
    high: Any,
    largest: Any,
    tiny: Any,
    x: Any,
    scales: Any,
) -> Any:
    """In each lane S1 / S2 largest of the candidate with the largest S1^2 / S2, the first of
    several.

    x = w / largest, S1 = sum(a c x), S2 = sum(a c^2), c = clip(rint(x step)); 0 where `largest` is
    not beyond `tiny`, and where no code but 0 comes out.

    Args:
        w: (n, LANES) float32, n > 0.
        a: (n,) float32.
        steps: (CANDIDATES or more,) float32 below 2**22 in magnitude.
        low, high, tiny: float32.
        largest: (LANES,) float32, of `largest_lanes`.
        x: (n, LANES) float32, out.
        scales: (LANES,) float32, out.
    """

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        values, weights, sizes, unit, xs, out = (
            address(context, b, signature, args, i) for i in (0, 1, 3, 6, 8, 9)
        )
        size = load(b, FLOATS, unit)
        magnitude = call(b, "llvm.fabs.v16f32", FLOATS, [size])
        is_large = b.fcmp_ordered(">", magnitude, splat(b, args[7], FLOATS))
        _multiply(b, values, args[2], b.select(is_large, b.fdiv(floats(1), size), floats(0)), xs)
        limits = [splat(b, args[i], FLOATS) for i in (4, 5)]
        best: list[Any] = []  # S1^2 / S2, S1, S2
        for first in range(0, CANDIDATES, TOGETHER):
            places = range(first, min(first + TOGETHER, CANDIDATES))
            factors = [splat_at(b, sizes, LONG(place)) for place in places]
            sums = _candidate_sums(b, xs, weights, args[2], factors, limits)
            for s1, s2 in zip(sums[: len(factors)], sums[len(factors) :], strict=True):
                found = [b.fdiv(b.fmul(s1, s1), s2), s1, s2]
                best = _better(b, found, best) if best else found
        scale = b.fmul(b.fdiv(best[1], best[2]), size)
        store(b, b.select(b.fcmp_ordered(">", best[2], floats(0)), scale, floats(0)), out)
        return context.get_dummy_value()

    return types.void(w, a, n, steps, low, high, largest, tiny, x, scales), codegen


@intrinsic
def round_lanes(
    _typing: Any,
    w: Any,
    n: Any,
    scales: Any,
    low: Any,
    high: Any,
    codes: Any,
    row: Any,
    col: Any,
    sums: Any,
) -> Any:
    """Nearest levels, ties to even, back in rows; all zero where the scale is.

    Args:
        w: (n, LANES) float32, n > 0 a multiple of LANES.
        scales: (LANES,) float32.
        low, high: float32.
        codes: (rows, cols) int8, C order, out: columns `col:col + n` of `LANES` rows from `row` on.
        sums: (2, LANES) float64: squares of the errors and of w are added, each summed in float32.
    """

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        values, sizes, totals = (address(context, b, signature, args, i) for i in (0, 2, 8))
        rows = row_addresses(context, b, signature, args, 5)
        limits = [splat(b, args[i], FLOATS) for i in (3, 4)]
        scale = load(b, FLOATS, sizes)
        is_zero = b.fcmp_ordered("==", scale, floats(0))

        def round_some(i: Any, squares: Sequence[Any]) -> list[Any]:
            place, levels = b.mul(i, LONG(LANES)), []
            errors, energies = squares
            for each in range(LANES):
                value = load(b, FLOATS, place_of(b, values, b.add(place, LONG(each))))
                ratio = call(b, "llvm.rint.v16f32", FLOATS, [b.fdiv(value, scale)])
                level = b.select(is_zero, floats(0), clip(b, ratio, limits))
                error = b.fsub(value, b.fmul(level, scale))
                errors, energies = fma(b, error, error, errors), fma(b, value, value, energies)
                levels.append(b.fptosi(level, INTS))
            for at, vector in zip(rows, transposed(b, levels), strict=True):
                store(b, b.trunc(vector, BYTES), b.add(b.add(at, args[7]), place), align=1)
            return [errors, energies]

        found = loop(b, b.sdiv(args[1], LONG(LANES)), [floats(0)] * 2, round_some)
        for place, total in enumerate(found):
            at = b.add(totals, LONG(8 * LANES * place))
            store(b, b.fadd(load(b, DOUBLES, at), b.fpext(total, DOUBLES)), at)
        return context.get_dummy_value()

    return types.void(w, n, scales, low, high, codes, row, col, sums), codegen


def _multiply(b: Any, values: Any, n: Any, factor: Any, out: Any) -> None:
    """Every vector times one."""

    def multiply(i: Any, _: Sequence[Any]) -> list[Any]:
        product = b.fmul(load(b, FLOATS, place_of(b, values, i)), factor)
        store(b, product, place_of(b, out, i))
        return []

    loop(b, n, [], multiply)


def _better(b: Any, found: Sequence[Any], best: Sequence[Any]) -> list[Any]:
    """Where the first number is larger, all of them."""
    is_better = b.fcmp_ordered(">", found[0], best[0])
    return [b.select(is_better, new, old) for new, old in zip(found, best, strict=True)]


def _candidate_sums(
    b: Any, xs: Any, weights: Any, n: Any, steps: Sequence[Any], limits: Sequence[Any]
) -> list[Any]:
    """S1 of every step, then S2."""
    magic = floats(MAGIC)

    def add(i: Any, totals: Sequence[Any]) -> list[Any]:
        x, a = load(b, FLOATS, place_of(b, xs, i)), splat_at(b, weights, i)
        added: list[Any] = [None] * len(totals)
        for k, step in enumerate(steps):
            code = clip(b, b.fsub(fma(b, x, step, magic), magic), limits)
            weighted = b.fmul(a, code)
            added[k] = fma(b, weighted, x, totals[k])
            added[len(steps) + k] = fma(b, weighted, code, totals[len(steps) + k])
        return added

    return loop(b, n, [floats(0)] * (2 * len(steps)), add)
