"""Operations of `arith` that compute a value: integers wrap as on the core."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from xdsl.dialects import arith
from xdsl.dialects.builtin import FloatAttr, IntegerAttr, IntegerType
from xdsl.ir import Attribute, Operation, SSAValue

from uq.errors import DesignError

Run = Callable[[dict[SSAValue, Any]], None]


def _bits(kind: Attribute) -> int:
    return kind.width.data if isinstance(kind, IntegerType) else 64


def _signed(value: int, bits: int) -> int:
    """Two's complement; i1 is 0 or 1."""
    value &= (1 << bits) - 1
    return value - (1 << bits) if bits > 1 and value >> (bits - 1) else value


def _truncated(a: int, b: int) -> int:
    """Division towards zero."""
    if b == 0:
        raise DesignError("a core divides by zero")
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def _integers(function: Callable[[int, int], int], *, unsigned: bool = False) -> Callable[..., Run]:
    def compile_op(op: Any) -> Run:
        left, right, result, bits = op.lhs, op.rhs, op.result, _bits(op.result.type)
        mask = (1 << bits) - 1

        def run(values: dict[SSAValue, Any]) -> None:
            a, b = values[left], values[right]
            if unsigned:
                a, b = a & mask, b & mask
            values[result] = _signed(function(a, b), bits)

        return run

    return compile_op


def _floats(function: Callable[[Any, Any], Any]) -> Callable[..., Run]:
    def compile_op(op: Any) -> Run:
        left, right, result = op.lhs, op.rhs, op.result

        def run(values: dict[SSAValue, Any]) -> None:
            values[result] = function(np.float32(values[left]), np.float32(values[right]))

        return run

    return compile_op


COMPARE: tuple[tuple[Callable[[int, int], bool], bool], ...] = (
    (operator.eq, False),
    (operator.ne, False),
    (operator.lt, False),
    (operator.le, False),
    (operator.gt, False),
    (operator.ge, False),
    (operator.lt, True),
    (operator.le, True),
    (operator.gt, True),
    (operator.ge, True),
)  # by the number of the predicate; with unsigned operands


def _compare(op: arith.CmpiOp) -> Run:
    function, unsigned = COMPARE[op.predicate.value.data]
    left, right, result, mask = op.lhs, op.rhs, op.result, (1 << _bits(op.lhs.type)) - 1

    def run(values: dict[SSAValue, Any]) -> None:
        a, b = values[left], values[right]
        values[result] = int(function(a & mask, b & mask) if unsigned else function(a, b))

    return run


def _constant(op: arith.ConstantOp) -> Run:
    if not isinstance(op.value, IntegerAttr | FloatAttr):
        raise DesignError(f"a constant of {op.result.type} is not emulated")
    value, result = op.value.value.data, op.result
    return lambda values: values.__setitem__(result, value)


def _select(op: arith.SelectOp) -> Run:
    def run(values: dict[SSAValue, Any]) -> None:
        values[op.result] = values[op.lhs if values[op.cond] else op.rhs]

    return run


def _convert(*, unsigned: bool = False) -> Callable[..., Run]:
    def compile_op(op: Any) -> Run:
        source, result = op.input, op.result
        before, after = _bits(source.type), _bits(result.type)

        def run(values: dict[SSAValue, Any]) -> None:
            value = values[source]
            values[result] = _signed(value & ((1 << before) - 1) if unsigned else value, after)

        return run

    return compile_op


FUNCTIONS: Mapping[type[Operation], Callable[..., Run]] = {
    arith.ConstantOp: _constant,
    arith.SelectOp: _select,
    arith.CmpiOp: _compare,
    arith.AddiOp: _integers(operator.add),
    arith.SubiOp: _integers(operator.sub),
    arith.MuliOp: _integers(operator.mul),
    arith.DivSIOp: _integers(_truncated),
    arith.DivUIOp: _integers(_truncated, unsigned=True),
    arith.RemSIOp: _integers(lambda a, b: a - b * _truncated(a, b)),
    arith.RemUIOp: _integers(lambda a, b: a - b * _truncated(a, b), unsigned=True),
    arith.AndIOp: _integers(operator.and_),
    arith.OrIOp: _integers(operator.or_),
    arith.XOrIOp: _integers(operator.xor),
    arith.ShLIOp: _integers(lambda a, b: a << min(b, 64)),
    arith.ShRSIOp: _integers(lambda a, b: a >> min(b, 64)),
    arith.ShRUIOp: _integers(lambda a, b: a >> min(b, 64), unsigned=True),
    arith.MaxSIOp: _integers(max),
    arith.MinSIOp: _integers(min),
    arith.MaxUIOp: _integers(max, unsigned=True),
    arith.MinUIOp: _integers(min, unsigned=True),
    arith.IndexCastOp: _convert(),
    arith.ExtSIOp: _convert(),
    arith.TruncIOp: _convert(),
    arith.ExtUIOp: _convert(unsigned=True),
    arith.AddfOp: _floats(operator.add),
    arith.SubfOp: _floats(operator.sub),
    arith.MulfOp: _floats(operator.mul),
}
