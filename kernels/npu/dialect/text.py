"""Pieces of text syntax that several operations share."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from math import prod
from typing import cast

from xdsl.dialects.builtin import (
    DenseIntOrFPElementsAttr,
    IntegerAttr,
    MemRefType,
    ShapedType,
    SymbolRefAttr,
    i32,
)
from xdsl.ir import Attribute, Block, Operation, Region, SSAValue
from xdsl.irdl import IRDLOperation
from xdsl.parser import AttrParser, Parser
from xdsl.printer import Printer

MAX_DENSE = 1 << 24


def parse_region(parser: Parser, arguments: Sequence[Parser.Argument] | None = None) -> Region:
    """A region with at least one block: `{}` stands for an empty one."""
    region = parser.parse_region(arguments)
    if not region.blocks:
        region.add_block(Block())
    return region


def parse_attributes(
    parser: Parser, operation: type[IRDLOperation], written: Mapping[str, Attribute | None]
) -> tuple[dict[str, Attribute], dict[str, Attribute]]:
    """The attribute dictionary, split into properties (with those already `written`) and others."""
    properties = {name: value for name, value in written.items() if value is not None}
    attributes: dict[str, Attribute] = {}
    known = operation.get_irdl_definition().properties
    for name, value in parser.parse_optional_attr_dict().items():
        if name in properties:
            parser.raise_error(f"{operation.name}: {name} is given twice")
        (properties if name in known else attributes)[name] = value
    return properties, attributes


def print_attributes(printer: Printer, op: Operation, written: Collection[str] = ()) -> None:
    """Everything that is not in the custom part of the syntax, as one dictionary."""
    printer.print_op_attributes(
        {**op.properties, **op.attributes},
        reserved_attr_names={*written, "operandSegmentSizes"},
    )


def parse_i32(parser: Parser) -> IntegerAttr:
    return IntegerAttr(parser.parse_integer(allow_boolean=False), i32)


def parse_dense(parser: Parser, kind: Attribute) -> DenseIntOrFPElementsAttr:
    """`dense<[...]>` without a type of its own: that of the buffer before it holds."""
    if not isinstance(kind, MemRefType):
        parser.raise_error("an initial value needs a memref type before it")
    check_dense(parser, kind)
    parser.parse_keyword("dense")
    return parser.parse_dense_int_or_fp_elements_attr(kind)


def of_type(
    parser: Parser, value: DenseIntOrFPElementsAttr, kind: Attribute
) -> DenseIntOrFPElementsAttr:
    """A value that an attribute dictionary gives as a tensor, in the type of its buffer."""
    if not isinstance(kind, MemRefType) or kind.get_shape() != value.get_shape():
        parser.raise_error("an initial value has the shape of its buffer")
    return DenseIntOrFPElementsAttr(kind, value.data)


def check_dense(parser: AttrParser, kind: ShapedType) -> None:
    """A splat is as long as its type says: refuse what would fill the memory."""
    if prod(kind.get_shape()) > MAX_DENSE:
        parser.raise_error(f"a dense value of more than {MAX_DENSE} elements")


def print_dense(printer: Printer, value: DenseIntOrFPElementsAttr) -> None:
    value.print_without_type(printer)


def print_region(printer: Printer, region: Region, *, arguments: bool = True) -> None:
    printer.print_string(" ")
    printer.print_region(region, print_entry_block_args=arguments, print_empty_block=False)


def flat(symbol: SymbolRefAttr) -> str:
    """The name of a symbol, without its `@`."""
    return symbol.root_reference.data


def integer(attribute: Attribute | None) -> int | None:
    """The value of an integer attribute; None where there is none or it is another kind."""
    return attribute.value.data if isinstance(attribute, IntegerAttr) else None


def memref_type(value: SSAValue) -> MemRefType[Attribute]:
    """The type of an operand that its operation declares as a memref."""
    return cast("MemRefType[Attribute]", value.type)
