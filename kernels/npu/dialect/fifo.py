"""`aie.objectfifo` and what uses it: links, acquire and release, access to the objects."""

from __future__ import annotations

from collections.abc import Sequence

from xdsl.dialects.builtin import (
    ArrayAttr,
    BoolAttr,
    DenseIntOrFPElementsAttr,
    IndexType,
    IntegerAttr,
    MemRefType,
    SymbolNameConstraint,
    SymbolRefAttr,
    i32,
    i64,
)
from xdsl.ir import Attribute, Operation, SSAValue
from xdsl.irdl import (
    IRDLOperation,
    ParsePropInAttrDict,
    base,
    irdl_op_definition,
    operand_def,
    opt_prop_def,
    prop_def,
    result_def,
    traits_def,
    var_operand_def,
)
from xdsl.parser import Parser
from xdsl.printer import Printer
from xdsl.traits import HasParent, SymbolOpInterface

from uq.kernels.npu.dialect.attributes import (
    DimensionsAttr,
    ObjectFifoType,
    PortAttr,
    SubviewType,
)
from uq.kernels.npu.dialect.structure import Device
from uq.kernels.npu.dialect.text import (
    parse_attributes,
    parse_dense,
    print_attributes,
    print_dense,
)

WRITTEN = ("sym_name", "elemNumber", "elemType", "init_values")
LAYOUTS = ("dimensionsToStream", "dimensionsFromStreamPerConsumer")


@irdl_op_definition
class ObjectFifo(IRDLOperation):
    """A ring of objects from one tile to others.

    `depth` is one number for all ends, or a list: the producer, then each consumer.
    """

    name = "aie.objectfifo"
    sym_name = prop_def(SymbolNameConstraint())
    depth = prop_def(base(IntegerAttr) | base(ArrayAttr[IntegerAttr]), prop_name="elemNumber")
    fifo_type = prop_def(ObjectFifoType, prop_name="elemType")
    to_stream = prop_def(DimensionsAttr, prop_name="dimensionsToStream")
    from_stream = prop_def(ArrayAttr[DimensionsAttr], prop_name="dimensionsFromStreamPerConsumer")
    via_dma = opt_prop_def(BoolAttr, prop_name="via_DMA")
    plio = opt_prop_def(BoolAttr)
    disable_synchronization = opt_prop_def(BoolAttr)
    via_shared_mem = opt_prop_def(IntegerAttr)
    repeat_count = opt_prop_def(IntegerAttr)
    init_values = opt_prop_def(ArrayAttr)
    producer = operand_def(IndexType())
    consumers = var_operand_def(IndexType())
    traits = traits_def(HasParent(Device), SymbolOpInterface())

    @classmethod
    def parse(cls, parser: Parser) -> ObjectFifo:
        written: dict[str, Attribute | None] = {"sym_name": parser.parse_symbol_name()}
        with parser.in_parens():
            producer, to_stream = _parse_end(parser, "dimensionsToStream")
            parser.parse_punctuation(",")
            ends = parser.parse_comma_separated_list(
                parser.Delimiter.BRACES, lambda: _parse_end(parser, "dimensionsFromStream")
            )
            parser.parse_punctuation(",")
            written["elemNumber"] = parser.parse_attribute()
        written["dimensionsToStream"] = to_stream
        written["dimensionsFromStreamPerConsumer"] = ArrayAttr([layout for _, layout in ends])
        properties, attributes = parse_attributes(parser, cls, written)
        parser.parse_punctuation(":")
        kind = parser.parse_type()
        properties["elemType"] = kind
        if parser.parse_optional_punctuation("="):
            if not isinstance(kind, ObjectFifoType):
                parser.raise_error("initial values need an aie.objectfifo type before them")
            properties["init_values"] = ArrayAttr(
                parser.parse_comma_separated_list(
                    parser.Delimiter.SQUARE, lambda: parse_dense(parser, kind.element)
                )
            )
        operands = [producer, *(tile for tile, _ in ends)]
        return cls.create(operands=operands, properties=properties, attributes=attributes)

    def print(self, printer: Printer) -> None:
        printer.print_string(" ")
        printer.print_symbol_name(self.sym_name.data)
        with printer.in_parens():
            _print_end(printer, self.producer, "dimensionsToStream", self.to_stream)
            printer.print_string(", ")
            with printer.in_braces():
                ends = list(zip(self.consumers, self.from_stream, strict=True))
                printer.print_list(
                    ends, lambda end: _print_end(printer, end[0], "dimensionsFromStream", end[1])
                )
            printer.print_string(", ")
            printer.print_attribute(self.depth)
        print_attributes(printer, self, (*WRITTEN, *LAYOUTS))
        printer.print_string(" : ")
        printer.print_attribute(self.fifo_type)
        if self.init_values is not None:
            printer.print_string(" = ")
            with printer.in_square_brackets():
                printer.print_list(self.init_values, lambda value: _print_init(printer, value))


@irdl_op_definition
class Link(IRDLOperation):
    """FIFOs that meet in one tile and share its buffers: forward, distribute or join."""

    name = "aie.objectfifo.link"
    inputs = prop_def(ArrayAttr[SymbolRefAttr], prop_name="fifoIns")
    outputs = prop_def(ArrayAttr[SymbolRefAttr], prop_name="fifoOuts")
    src_offsets = prop_def(ArrayAttr[IntegerAttr])
    dst_offsets = prop_def(ArrayAttr[IntegerAttr])
    traits = traits_def(HasParent(Device))

    @classmethod
    def parse(cls, parser: Parser) -> Link:
        written: dict[str, Attribute | None] = {"fifoIns": parser.parse_attribute()}
        parser.parse_punctuation("->")
        written["fifoOuts"] = parser.parse_attribute()
        with parser.in_parens():
            written["src_offsets"] = _parse_offsets(parser)
            written["dst_offsets"] = _parse_offsets(parser)
        properties, attributes = parse_attributes(parser, cls, written)
        return cls.create(properties=properties, attributes=attributes)

    def print(self, printer: Printer) -> None:
        printer.print_string(" ")
        printer.print_attribute(self.inputs)
        printer.print_string(" -> ")
        printer.print_attribute(self.outputs)
        source, dest = (
            [offset.value.data for offset in offsets]
            for offsets in (self.src_offsets, self.dst_offsets)
        )
        printer.print_string(f" ({source} {dest})")
        print_attributes(printer, self, ("fifoIns", "fifoOuts", "src_offsets", "dst_offsets"))


@irdl_op_definition
class Acquire(IRDLOperation):
    name = "aie.objectfifo.acquire"
    fifo = prop_def(SymbolRefAttr, prop_name="objFifo_name")
    port = prop_def(PortAttr)
    size = prop_def(IntegerAttr.constr(type=i32))
    subview = result_def(SubviewType)
    assembly_format = "$objFifo_name `(` $port `,` $size `)` attr-dict `:` type($subview)"
    irdl_options = (ParsePropInAttrDict(),)


@irdl_op_definition
class Release(IRDLOperation):
    name = "aie.objectfifo.release"
    fifo = prop_def(SymbolRefAttr, prop_name="objFifo_name")
    port = prop_def(PortAttr)
    size = prop_def(IntegerAttr.constr(type=i32))
    assembly_format = "$objFifo_name `(` $port `,` $size `)` attr-dict"
    irdl_options = (ParsePropInAttrDict(),)


@irdl_op_definition
class Access(IRDLOperation):
    name = "aie.objectfifo.subview.access"
    subview = operand_def(SubviewType)
    index = prop_def(IntegerAttr.constr(type=i32))
    output = result_def(MemRefType)
    assembly_format = "$subview `[` $index `]` attr-dict `:` type($subview) `->` type($output)"
    irdl_options = (ParsePropInAttrDict(),)


def _parse_end(parser: Parser, keyword: str) -> tuple[SSAValue, DimensionsAttr]:
    tile = parser.parse_operand(IndexType())
    if parser.parse_optional_keyword(keyword) is None:
        return tile, DimensionsAttr(())
    return tile, DimensionsAttr(DimensionsAttr.parse_parameter(parser))


def _print_end(printer: Printer, tile: SSAValue, keyword: str, layout: DimensionsAttr) -> None:
    printer.print_operand(tile)
    if layout.data:
        printer.print_string(f" {keyword} ")
        layout.print_parameter(printer)


def _parse_offsets(parser: Parser) -> ArrayAttr[IntegerAttr]:
    values: Sequence[int] = parser.parse_comma_separated_list(
        parser.Delimiter.SQUARE, lambda: parser.parse_integer(allow_boolean=False)
    )
    return ArrayAttr([IntegerAttr(value, i64) for value in values])


def _print_init(printer: Printer, value: Attribute) -> None:
    if isinstance(value, DenseIntOrFPElementsAttr):
        print_dense(printer, value)


FIFO: list[type[Operation]] = [ObjectFifo, Link, Acquire, Release, Access]
