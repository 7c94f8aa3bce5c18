"""Register tiles: R rows times `TILE_LANES` lanes, held in registers while the inner axis runs.

A tile is two vectors of lanes for every row. Every row is computed as if it were alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from uq.kernels.cpu import llvm
from uq.kernels.cpu.llvm import AHEAD, CHUNK, LANES

TILE_LANES = 2 * LANES  # rows of a weight, or keys, or head dimensions
TILE_ROWS = 12 if llvm.has("avx512f") else 3  # as many as the registers hold

Values = list[ir.Value]

# Instructions are emitted in an order that needs few registers, each factor just before its use:
# LLVM keeps that order, and spills when many factors are loaded first.


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
            xs = _rows(b, x, x_row, rows)
            cells = [at for row in _rows(b, out, out_row, rows) for at in _halves(b, row)]

            def step(i: ir.Value, totals: Values) -> Values:
                lines = _halves(b, b.add(w, b.mul(i, w_step)))
                for line in lines:
                    llvm.prefetch(b, b.add(line, llvm.LONG(AHEAD)))
                lanes = [llvm.load(b, llvm.FLOATS, line) for line in lines]
                offset = b.mul(i, llvm.LONG(4))
                factors = [_broadcast(b, b.add(row, offset), llvm.FLOATS) for row in xs]
                pairs = [(factor, lane) for factor in factors for lane in lanes]
                return [
                    llvm.fma(b, *pair, total) for pair, total in zip(pairs, totals, strict=True)
                ]

            start = [llvm.load(b, llvm.FLOATS, at) for at in cells]
            for at, total in zip(cells, _repeat(b, count, step, start), strict=True):
                llvm.store(b, total, at)
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
        xs: Any,
        xs_row: Any,
        w: Any,
        scale: Any,
        out: Any,
        out_row: Any,
    ) -> Any:
        def emit(context: Any, b: Any, signature: Any, args: Any) -> ir.Value:
            x, x_row, xs, xs_row, w, scale, out, out_row = args
            dots = _dots(b, _rows(b, x, x_row, rows), w)
            scales = [llvm.load(b, llvm.FLOATS, at) for at in _halves(b, scale)]
            outs = _rows(b, out, out_row, rows)
            for row, at in enumerate(_rows(b, xs, xs_row, rows)):
                x_scale = _broadcast(b, at, llvm.FLOATS)
                cells = _halves(b, outs[row])
                own = dots[2 * row : 2 * row + 2]
                for cell, ints, lane_scale in zip(cells, own, scales, strict=True):
                    factor, total = b.fmul(x_scale, lane_scale), llvm.load(b, llvm.FLOATS, cell)
                    total = llvm.fma(b, b.sitofp(ints, llvm.FLOATS), factor, total)
                    llvm.store(b, total, cell)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 8), emit

    return tile


def _dots(b: ir.IRBuilder, xs: Values, w: ir.Value) -> Values:
    """Dot products of one chunk of every row with the lanes, unrolled."""
    dots = [ir.Constant(llvm.INTS, [0] * LANES)] * (2 * len(xs))
    for pair in range(CHUNK // 2):
        lines = _halves(b, b.add(w, llvm.LONG(8 * LANES * pair)))
        lanes = [llvm.load(b, llvm.INTS, line) for line in lines]
        for row, at in enumerate(xs):
            factor = _broadcast(b, b.add(at, llvm.LONG(4 * pair)), llvm.INTS)
            for half, lane in enumerate(lanes):
                dots[2 * row + half] = llvm.dot(b, dots[2 * row + half], lane, factor)
    return dots


def _repeat(
    b: ir.IRBuilder, count: ir.Value, step: Callable[[ir.Value, Values], Values], start: Values
) -> Values:
    """values = start; for i in range(count): values = step(i, values). They stay in registers."""
    slots = [cgutils.alloca_once_value(b, value) for value in start]
    with cgutils.for_range(b, count) as loop:
        values = step(loop.index, [b.load(slot) for slot in slots])
        for slot, value in zip(slots, values, strict=True):
            b.store(value, slot)
    return [b.load(slot) for slot in slots]


def _rows(b: ir.IRBuilder, base: ir.Value, stride: ir.Value, count: int) -> Values:
    """Addresses of rows."""
    return [b.add(base, b.mul(stride, llvm.LONG(row))) for row in range(count)]


def _halves(b: ir.IRBuilder, row: ir.Value) -> Values:
    """Addresses of the two vectors of `TILE_LANES` lanes."""
    return [row, b.add(row, llvm.LONG(4 * LANES))]


def _broadcast(b: ir.IRBuilder, at: ir.Value, lowered: ir.VectorType) -> ir.Value:
    """The element at an address in every lane."""
    return llvm.splat(b, llvm.load(b, lowered.element, at), lowered)
