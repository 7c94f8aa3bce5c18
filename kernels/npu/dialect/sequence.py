"""`aiex` operations: what a runtime sequence does to the array, one command each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from xdsl.dialects.builtin import (
    BoolAttr,
    DenseArrayBase,
    IndexType,
    IntegerAttr,
    MemRefType,
    SymbolRefAttr,
    i32,
    i64,
)
from xdsl.ir import Attribute, Operation, SSAValue
from xdsl.irdl import (
    IRDLOperation,
    ParsePropInAttrDict,
    irdl_op_definition,
    operand_def,
    opt_prop_def,
    prop_def,
    var_operand_def,
)
from xdsl.parser import Parser
from xdsl.printer import Printer

from uq.kernels.npu.dialect.attributes import DirectionAttr, PacketInfoAttr
from uq.kernels.npu.dialect.structure import LegacyRuntimeSequence
from uq.kernels.npu.dialect.text import flat, parse_attributes, parse_i32, print_attributes

NUMBER = IntegerAttr.constr(type=i32)
DYNAMIC = -(2**63)  # stands in a static list for a value that is an operand
LISTS = ("static_offsets", "static_sizes", "static_strides")


@irdl_op_definition
class MemcpyNd(IRDLOperation):
    """One transfer between a buffer of the host and a shim channel, up to four dimensions.

    Lists are slowest first, in elements; the first size repeats the whole transfer.
    """

    name = "aiex.npu.dma_memcpy_nd"
    memref = operand_def(MemRefType)
    dynamic = var_operand_def()
    static_offsets = prop_def(DenseArrayBase)
    static_sizes = prop_def(DenseArrayBase)
    static_strides = prop_def(DenseArrayBase)
    packet = opt_prop_def(PacketInfoAttr)
    metadata = prop_def(SymbolRefAttr)
    id = prop_def(IntegerAttr)
    issue_token = opt_prop_def(BoolAttr)
    burst_length = opt_prop_def(IntegerAttr)

    @classmethod
    def parse(cls, parser: Parser) -> MemcpyNd:
        written: dict[str, Attribute | None] = {}
        with parser.in_parens():
            if parser.parse_optional_integer() is not None:  # x and y of 2024, always 0
                parser.parse_punctuation(",")
                parser.parse_integer()
                parser.parse_punctuation(",")
            memref = parser.parse_unresolved_operand()
            dynamic: list[SSAValue] = []
            for name in LISTS:
                written[name] = _parse_list(parser, dynamic)
            if parser.parse_optional_punctuation(","):
                parser.parse_keyword("packet")
                parser.parse_punctuation("=")
                written["packet"] = PacketInfoAttr(PacketInfoAttr.parse_parameter(parser))
        properties, attributes = parse_attributes(parser, cls, written)
        parser.parse_punctuation(":")
        operands = [parser.resolve_operand(memref, parser.parse_type()), *dynamic]
        return cls.create(operands=operands, properties=properties, attributes=attributes)

    def print(self, printer: Printer) -> None:
        dynamic = iter(self.dynamic)
        with printer.in_parens():
            printer.print_operand(self.memref)
            for values in (self.static_offsets, self.static_sizes, self.static_strides):
                with printer.in_square_brackets():
                    printer.print_list(
                        values.get_values(), lambda value: _print_value(printer, value, dynamic)
                    )
            if self.packet is not None:
                printer.print_string(", packet = ")
                self.packet.print_parameter(printer)
        print_attributes(printer, self, (*LISTS, "packet"))
        printer.print_string(" : ")
        printer.print_attribute(self.memref.type)


@irdl_op_definition
class DmaWait(IRDLOperation):
    """Wait for the token of a transfer of this FIFO or allocation."""

    name = "aiex.npu.dma_wait"
    symbol = prop_def(SymbolRefAttr)
    assembly_format = "attr-dict"
    irdl_options = (ParsePropInAttrDict(),)


@irdl_op_definition
class Sync(IRDLOperation):
    name = "aiex.npu.sync"
    column = prop_def(IntegerAttr)
    row = prop_def(IntegerAttr)
    direction = prop_def(IntegerAttr)
    channel = prop_def(IntegerAttr)
    column_num = prop_def(IntegerAttr)
    row_num = prop_def(IntegerAttr)
    assembly_format = "attr-dict"
    irdl_options = (ParsePropInAttrDict(),)


@irdl_op_definition
class Write32(IRDLOperation):
    name = "aiex.npu.write32"
    address = prop_def(IntegerAttr)
    value = prop_def(IntegerAttr)
    buffer = opt_prop_def(SymbolRefAttr)
    column = opt_prop_def(IntegerAttr)
    row = opt_prop_def(IntegerAttr)
    assembly_format = "attr-dict"
    irdl_options = (ParsePropInAttrDict(),)


@irdl_op_definition
class MaskWrite32(IRDLOperation):
    name = "aiex.npu.maskwrite32"
    address = prop_def(IntegerAttr)
    value = prop_def(IntegerAttr)
    mask = prop_def(IntegerAttr)
    buffer = opt_prop_def(SymbolRefAttr)
    column = opt_prop_def(IntegerAttr)
    row = opt_prop_def(IntegerAttr)
    assembly_format = "attr-dict"
    irdl_options = (ParsePropInAttrDict(),)


@irdl_op_definition
class BlockWrite(IRDLOperation):
    name = "aiex.npu.blockwrite"
    data = operand_def(MemRefType)
    address = prop_def(IntegerAttr)
    buffer = opt_prop_def(SymbolRefAttr)
    column = opt_prop_def(IntegerAttr)
    row = opt_prop_def(IntegerAttr)
    assembly_format = "`(` $data `)` attr-dict `:` type($data)"
    irdl_options = (ParsePropInAttrDict(),)


@irdl_op_definition
class AddressPatch(IRDLOperation):
    """Add the address of a host buffer to a BD: argument `arg_idx` plus `arg_plus` bytes."""

    name = "aiex.npu.address_patch"
    addr = prop_def(IntegerAttr)
    arg_idx = prop_def(IntegerAttr)
    arg_plus = prop_def(IntegerAttr)
    assembly_format = "attr-dict"
    irdl_options = (ParsePropInAttrDict(),)


@irdl_op_definition
class PushQueue(IRDLOperation):
    name = "aiex.npu.push_queue"
    column = prop_def(NUMBER)
    row = prop_def(NUMBER)
    direction = prop_def(DirectionAttr)
    channel = prop_def(NUMBER)
    issue_token = prop_def(BoolAttr)
    repeat_count = prop_def(IntegerAttr)
    bd_id = prop_def(IntegerAttr)
    assembly_format = "`(` $column `,` $row `,` $direction `:` $channel `)` attr-dict"
    irdl_options = (ParsePropInAttrDict(),)


@irdl_op_definition
class RtpWrite(IRDLOperation):
    """Write one 32-bit word of a buffer that holds run-time parameters."""

    name = "aiex.npu.rtp_write"
    buffer = prop_def(SymbolRefAttr)
    index = prop_def(IntegerAttr)
    value = prop_def(IntegerAttr)

    @classmethod
    def parse(cls, parser: Parser) -> RtpWrite:
        written: dict[str, Attribute | None] = {}
        with parser.in_parens():
            written["buffer"] = SymbolRefAttr(parser.parse_symbol_name())
            for name in ("index", "value"):
                parser.parse_punctuation(",")
                written[name] = parse_i32(parser)
        properties, attributes = parse_attributes(parser, cls, written)
        return cls.create(properties=properties, attributes=attributes)

    def print(self, printer: Printer) -> None:
        with printer.in_parens():
            printer.print_symbol_name(flat(self.buffer))
            printer.print_string(f", {self.index.value.data}, {self.value.value.data}")
        print_attributes(printer, self, ("buffer", "index", "value"))


@irdl_op_definition
class SetLock(IRDLOperation):
    name = "aiex.set_lock"
    lock = operand_def(IndexType())
    value = prop_def(NUMBER)
    assembly_format = "`(` $lock `,` $value `)` attr-dict"


@irdl_op_definition
class Preempt(IRDLOperation):
    name = "aiex.npu.preempt"
    level = prop_def(IntegerAttr)
    assembly_format = "attr-dict"
    irdl_options = (ParsePropInAttrDict(),)


def _parse_list(parser: Parser, dynamic: list[SSAValue]) -> DenseArrayBase:
    def item() -> int:
        if (operand := parser.parse_optional_unresolved_operand()) is None:
            return parser.parse_integer(allow_boolean=False)
        dynamic.append(parser.resolve_operand(operand, i64))
        return DYNAMIC

    values: Sequence[int] = parser.parse_comma_separated_list(parser.Delimiter.SQUARE, item)
    return DenseArrayBase.from_list(i64, values)


def _print_value(printer: Printer, value: object, dynamic: Iterator[SSAValue]) -> None:
    if value == DYNAMIC:
        printer.print_operand(next(dynamic))
    else:
        printer.print_string(str(value))


SEQUENCE: list[type[Operation]] = [
    MemcpyNd,
    DmaWait,
    Sync,
    Write32,
    MaskWrite32,
    BlockWrite,
    AddressPatch,
    PushQueue,
    RtpWrite,
    SetLock,
    Preempt,
    LegacyRuntimeSequence,
]
