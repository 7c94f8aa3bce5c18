"""LLVM building blocks of the loops in `lanes`: 16 lanes, addresses as integers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir

from uq.kernels.cpu.llvm import FLOAT, FLOATS, INT, INTS, LANES, LONG, load, splat


def loop(
    b: Any, count: Any, start: Sequence[Any], body: Callable[[Any, Sequence[Any]], list[Any]]
) -> list[Any]:
    """`values = body(i, values)` for i of 0 to count - 1, at least once; the last values."""
    before, block = b.block, b.append_basic_block("loop")
    b.branch(block)
    b.position_at_end(block)
    i, values = b.phi(LONG), [b.phi(value.type) for value in start]
    found = body(i, values)
    following = b.add(i, LONG(1))
    for phi, first, last in zip([i, *values], [LONG(0), *start], [following, *found], strict=True):
        phi.add_incoming(first, before)
        phi.add_incoming(last, b.block)
    behind = b.append_basic_block("behind")
    b.cbranch(b.icmp_signed("<", following, count), block, behind)
    b.position_at_end(behind)
    return found


def address(context: Any, b: Any, signature: Any, args: Any, index: int) -> Any:
    """Of the first element of an argument that is an array."""
    array = context.make_array(signature.args[index])(context, b, args[index])
    return b.ptrtoint(array.data, LONG)


def row_addresses(context: Any, b: Any, signature: Any, args: Any, index: int) -> list[Any]:
    """Of `LANES` rows of a matrix, from the row on that the next argument is."""
    kind = signature.args[index]
    array = context.make_array(kind)(context, b, args[index])
    stride = b.extract_value(array.strides, 0)
    first = args[index + 1]
    base = b.add(b.ptrtoint(array.data, LONG), b.mul(first, stride))
    return [b.add(base, b.mul(stride, LONG(lane))) for lane in range(LANES)]


def place_of(b: Any, address: Any, i: Any) -> Any:
    """Of vector `i` of floats or integers."""
    return b.add(address, b.mul(i, LONG(4 * LANES)))


def store(b: Any, value: Any, at: Any, align: int = 4) -> None:
    b.store(value, b.inttoptr(at, value.type.as_pointer())).align = align


def splat_at(b: Any, address: Any, i: Any) -> Any:
    """Float `i` in every lane."""
    return splat(b, load(b, FLOAT, b.add(address, b.mul(i, LONG(4)))), FLOATS)


def clip(b: Any, value: Any, limits: Sequence[Any]) -> Any:
    low, high = limits
    value = b.select(b.fcmp_ordered(">", value, low), value, low)
    return b.select(b.fcmp_ordered("<", value, high), value, high)


def transposed(b: Any, rows: Sequence[Any]) -> list[Any]:
    """A square of integers: blocks of 1, 2, 4 and 8 change places across the diagonal."""
    found = list(rows)
    for step in (1, 2, 4, 8):
        kept = [lane if not lane & step else LANES + lane - step for lane in range(LANES)]
        given = [lane + step if not lane & step else LANES + lane for lane in range(LANES)]
        for i in (i for i in range(LANES) if not i & step):
            pair = found[i], found[i + step]
            found[i], found[i + step] = (
                b.shuffle_vector(*pair, ir.Constant(INTS, order)) for order in (kept, given)
            )
    return found


def floats(value: float) -> Any:
    return ir.Constant(FLOATS, [float(value)] * LANES)


def ints(value: int) -> Any:
    return ir.Constant(INTS, [INT(value)] * LANES)
