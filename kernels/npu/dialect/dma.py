"""`aie` operations that program DMA channels with buffer descriptors (BD)."""

from __future__ import annotations

from xdsl.dialects.builtin import (
    BoolAttr,
    IntegerAttr,
    MemRefType,
    StringAttr,
    i1,
    i32,
)
from xdsl.ir import Attribute, Operation
from xdsl.irdl import (
    IRDLOperation,
    ParsePropInAttrDict,
    irdl_op_definition,
    operand_def,
    opt_prop_def,
    prop_def,
    result_def,
    successor_def,
    traits_def,
    var_region_def,
)
from xdsl.parser import Parser
from xdsl.printer import Printer
from xdsl.traits import IsTerminator, NoTerminator

from uq.kernels.npu.dialect.attributes import (
    DimensionsAttr,
    DirectionAttr,
    PacketInfoAttr,
    PaddingsAttr,
)
from uq.kernels.npu.dialect.text import (
    parse_attributes,
    parse_i32,
    parse_region,
    print_attributes,
)

CHANNEL = IntegerAttr.constr(type=i32)


@irdl_op_definition
class DmaStart(IRDLOperation):
    """Start of a chain of BDs on one channel; `repeat_count` 0 runs it once."""

    name = "aie.dma_start"
    channel_dir = prop_def(DirectionAttr)
    channel_index = prop_def(CHANNEL)
    repeat_count = opt_prop_def(CHANNEL)
    dest = successor_def()
    chain = successor_def()
    valid = result_def(i1)
    traits = traits_def(IsTerminator())
    assembly_format = (
        "`(` $channel_dir `,` $channel_index `,` $dest `,` $chain "
        "(`,` `repeat_count` `=` $repeat_count^)? `)` attr-dict"
    )
    irdl_options = (ParsePropInAttrDict(),)


@irdl_op_definition
class NextBd(IRDLOperation):
    name = "aie.next_bd"
    dest = successor_def()
    traits = traits_def(IsTerminator())
    assembly_format = "$dest attr-dict"


@irdl_op_definition
class Dma(IRDLOperation):
    """A channel with its BDs as regions: `aie.dma(S2MM, 0) [{...}, {...}]`; they run in a ring."""

    name = "aie.dma"
    channel_dir = prop_def(DirectionAttr)
    channel_index = prop_def(CHANNEL)
    loop = opt_prop_def(BoolAttr)
    repeat_count = opt_prop_def(IntegerAttr)
    sym_name = opt_prop_def(StringAttr)
    bds = var_region_def()
    valid = result_def(i1)
    traits = traits_def(NoTerminator())

    @classmethod
    def parse(cls, parser: Parser) -> Dma:
        with parser.in_parens():
            direction = DirectionAttr(DirectionAttr.parse_parameter(parser))
            parser.parse_punctuation(",")
            channel = parse_i32(parser)
        written = {"channel_dir": direction, "channel_index": channel}
        properties, attributes = parse_attributes(parser, cls, written)
        bds = parser.parse_comma_separated_list(
            parser.Delimiter.SQUARE, lambda: parse_region(parser)
        )
        return cls.create(
            result_types=[i1], properties=properties, attributes=attributes, regions=bds
        )

    def print(self, printer: Printer) -> None:
        printer.print_string(f"({self.channel_dir.data}, {self.channel_index.value.data})")
        print_attributes(printer, self, ("channel_dir", "channel_index"))
        printer.print_string(" ")
        with printer.in_square_brackets():
            printer.print_list(self.bds, printer.print_region)


@irdl_op_definition
class DmaBd(IRDLOperation):
    """One buffer descriptor. Offset, length, sizes and strides count elements of the buffer.

    Left out, the offset is 0, the length the whole buffer and the layout linear.
    """

    name = "aie.dma_bd"
    buffer = operand_def(MemRefType)
    offset = opt_prop_def(IntegerAttr)
    len = opt_prop_def(IntegerAttr)
    dimensions = opt_prop_def(DimensionsAttr)
    pad_dimensions = opt_prop_def(PaddingsAttr)
    pad_value = opt_prop_def(IntegerAttr)
    bd_id = opt_prop_def(IntegerAttr)
    packet = opt_prop_def(PacketInfoAttr)
    next_bd_id = opt_prop_def(IntegerAttr)
    burst_length = opt_prop_def(IntegerAttr)

    @classmethod
    def parse(cls, parser: Parser) -> DmaBd:
        written: dict[str, Attribute | None] = {}
        with parser.in_parens():
            buffer = parser.parse_unresolved_operand()
            parser.parse_punctuation(":")
            operand = parser.resolve_operand(buffer, parser.parse_type())
            if parser.parse_optional_punctuation(","):
                written["offset"] = parse_i32(parser)
            if "offset" in written and parser.parse_optional_punctuation(","):
                written["len"] = parse_i32(parser)
            if "len" in written and parser.parse_optional_punctuation(","):
                written["dimensions"] = DimensionsAttr(DimensionsAttr.parse_parameter(parser))
            if "dimensions" in written and parser.parse_optional_punctuation(","):
                written["pad_dimensions"] = PaddingsAttr(PaddingsAttr.parse_parameter(parser))
        properties, attributes = parse_attributes(parser, cls, written)
        return cls.create(operands=[operand], properties=properties, attributes=attributes)

    def print(self, printer: Printer) -> None:
        positional = self._positional()
        with printer.in_parens():
            printer.print_operand(self.buffer)
            printer.print_string(" : ")
            printer.print_attribute(self.buffer.type)
            for name in positional:
                printer.print_string(", ")
                value = self.properties[name]
                if isinstance(value, IntegerAttr):
                    printer.print_int(value.value.data)
                elif isinstance(value, DimensionsAttr | PaddingsAttr):
                    value.print_parameter(printer)
        print_attributes(printer, self, positional)

    def _positional(self) -> list[str]:
        """Arguments are written by position up to the first that is missing."""
        names: list[str] = []
        for name in ("offset", "len", "dimensions", "pad_dimensions"):
            if name not in self.properties:
                break
            names.append(name)
        return names


@irdl_op_definition
class DmaBdPacket(IRDLOperation):
    name = "aie.dma_bd_packet"
    packet_type = prop_def(CHANNEL)
    packet_id = prop_def(CHANNEL)
    assembly_format = "`(` $packet_type `,` $packet_id `)` attr-dict"


DMA: list[type[Operation]] = [DmaStart, NextBd, Dma, DmaBd, DmaBdPacket]
