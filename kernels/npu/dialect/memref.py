"""`memref.global` and `memref.copy` in the syntax of MLIR; xDSL only has the generic form."""

from __future__ import annotations

from xdsl.dialects.builtin import (
    DenseIntOrFPElementsAttr,
    MemRefType,
    StringAttr,
    SymbolNameConstraint,
    UnitAttr,
)
from xdsl.ir import Attribute
from xdsl.irdl import (
    IRDLOperation,
    base,
    irdl_op_definition,
    operand_def,
    opt_prop_def,
    prop_def,
    traits_def,
)
from xdsl.parser import Parser
from xdsl.printer import Printer
from xdsl.traits import SymbolOpInterface

from uq.kernels.npu.dialect.text import (
    parse_attributes,
    parse_dense,
    print_attributes,
    print_dense,
)


@irdl_op_definition
class Global(IRDLOperation):
    """`memref.global "private" constant @data : memref<8xi32> = dense<[...]>`."""

    name = "memref.global"
    sym_name = prop_def(SymbolNameConstraint())
    sym_visibility = opt_prop_def(StringAttr)
    type = prop_def(MemRefType)
    initial_value = opt_prop_def(base(UnitAttr) | base(DenseIntOrFPElementsAttr))
    constant = opt_prop_def(UnitAttr)
    traits = traits_def(SymbolOpInterface())

    @classmethod
    def parse(cls, parser: Parser) -> Global:
        written: dict[str, Attribute | None] = {}
        if (visibility := parser.parse_optional_str_literal()) is not None:
            written["sym_visibility"] = StringAttr(visibility)
        if parser.parse_optional_keyword("constant"):
            written["constant"] = UnitAttr()
        written["sym_name"] = parser.parse_symbol_name()
        parser.parse_punctuation(":")
        written["type"] = kind = parser.parse_type()
        if parser.parse_optional_punctuation("="):
            bare = parser.parse_optional_keyword("uninitialized")
            written["initial_value"] = UnitAttr() if bare else parse_dense(parser, kind)
        properties, attributes = parse_attributes(parser, cls, written)
        return cls.create(properties=properties, attributes=attributes)

    def print(self, printer: Printer) -> None:
        if self.sym_visibility is not None:
            printer.print_string(" ")
            printer.print_string_literal(self.sym_visibility.data)
        printer.print_string(" constant " if self.constant else " ")
        printer.print_symbol_name(self.sym_name.data)
        printer.print_string(" : ")
        printer.print_attribute(self.type)
        if isinstance(self.initial_value, DenseIntOrFPElementsAttr):
            printer.print_string(" = ")
            print_dense(printer, self.initial_value)
        elif self.initial_value is not None:
            printer.print_string(" = uninitialized")
        print_attributes(printer, self, list(self.properties))


@irdl_op_definition
class Copy(IRDLOperation):
    """`memref.copy %source, %target : memref<8xi32> to memref<8xi32>`."""

    name = "memref.copy"
    source = operand_def(MemRefType)
    target = operand_def(MemRefType)
    assembly_format = "$source `,` $target attr-dict `:` type($source) `to` type($target)"


MEMREF: tuple[type[IRDLOperation], ...] = (Global, Copy)
