"""`aie` operations for streams between tiles, and the names of shim channels."""

from __future__ import annotations

from xdsl.dialects.builtin import BoolAttr, IndexType, IntegerAttr, StringAttr, i8, i32
from xdsl.ir import Attribute, Operation
from xdsl.irdl import (
    IRDLOperation,
    ParsePropInAttrDict,
    irdl_op_definition,
    operand_def,
    opt_operand_def,
    opt_prop_def,
    prop_def,
    region_def,
    traits_def,
)
from xdsl.parser import Parser
from xdsl.printer import Printer
from xdsl.traits import (
    HasParent,
    SingleBlockImplicitTerminator,
    SymbolOpInterface,
)

from uq.kernels.npu.dialect.attributes import BundleAttr, DirectionAttr
from uq.kernels.npu.dialect.structure import End, close_region
from uq.kernels.npu.dialect.text import parse_attributes, parse_i32, print_attributes

CHANNEL = IntegerAttr.constr(type=i32)


@irdl_op_definition
class Flow(IRDLOperation):
    """A circuit-switched stream from one port to another."""

    name = "aie.flow"
    source = operand_def(IndexType())
    source_bundle = prop_def(BundleAttr)
    source_channel = prop_def(CHANNEL)
    dest = operand_def(IndexType())
    dest_bundle = prop_def(BundleAttr)
    dest_channel = prop_def(CHANNEL)
    assembly_format = (
        "`(` $source `,` $source_bundle `:` $source_channel `,` "
        "$dest `,` $dest_bundle `:` $dest_channel `)` attr-dict"
    )


@irdl_op_definition
class PacketFlow(IRDLOperation):
    name = "aie.packet_flow"
    id = prop_def(IntegerAttr.constr(type=i8), prop_name="ID")
    keep_pkt_header = opt_prop_def(BoolAttr)
    priority_route = opt_prop_def(BoolAttr)
    ports = region_def("single_block")
    traits = traits_def(SingleBlockImplicitTerminator(End))
    assembly_format = "`(` $ID `)` $ports attr-dict"
    irdl_options = (ParsePropInAttrDict(),)

    def __post_init__(self) -> None:
        close_region(self, self.ports)


@irdl_op_definition
class PacketSource(IRDLOperation):
    name = "aie.packet_source"
    tile = operand_def(IndexType())
    bundle = prop_def(BundleAttr)
    channel = prop_def(CHANNEL)
    traits = traits_def(HasParent(PacketFlow))
    assembly_format = "`<` $tile `,` $bundle `:` $channel `>` attr-dict"


@irdl_op_definition
class PacketDest(IRDLOperation):
    name = "aie.packet_dest"
    tile = operand_def(IndexType())
    bundle = prop_def(BundleAttr)
    channel = prop_def(CHANNEL)
    traits = traits_def(HasParent(PacketFlow))
    assembly_format = "`<` $tile `,` $bundle `:` $channel `>` attr-dict"


@irdl_op_definition
class CascadeFlow(IRDLOperation):
    name = "aie.cascade_flow"
    source_tile = operand_def(IndexType())
    dest_tile = operand_def(IndexType())
    assembly_format = "`(` $source_tile `,` $dest_tile `)` attr-dict"


@irdl_op_definition
class ShimDmaAllocation(IRDLOperation):
    """Names a DMA channel of a shim tile: by its tile, or by its column as before 2026."""

    name = "aie.shim_dma_allocation"
    sym_name = prop_def(StringAttr)
    channel_dir = prop_def(DirectionAttr)
    channel_index = prop_def(IntegerAttr)
    col = opt_prop_def(IntegerAttr)
    plio = opt_prop_def(BoolAttr)
    tile = opt_operand_def(IndexType())
    traits = traits_def(SymbolOpInterface())

    @classmethod
    def parse(cls, parser: Parser) -> ShimDmaAllocation:
        written: dict[str, Attribute | None] = {"sym_name": parser.parse_symbol_name()}
        with parser.in_parens():
            if (tile := parser.parse_optional_operand(IndexType())) is not None:
                parser.parse_punctuation(",")
            written["channel_dir"] = DirectionAttr(DirectionAttr.parse_parameter(parser))
            parser.parse_punctuation(",")
            written["channel_index"] = parse_i32(parser)
            if tile is None:
                parser.parse_punctuation(",")
                written["col"] = parse_i32(parser)
        properties, attributes = parse_attributes(parser, cls, written)
        operands = [] if tile is None else [tile]
        return cls.create(operands=operands, properties=properties, attributes=attributes)

    def print(self, printer: Printer) -> None:
        printer.print_string(" ")
        printer.print_symbol_name(self.sym_name.data)
        channel = f"{self.channel_dir.data}, {self.channel_index.value.data}"
        with printer.in_parens():
            if self.tile is not None:
                printer.print_operand(self.tile)
                printer.print_string(f", {channel}")
            elif self.col is not None:
                printer.print_string(f"{channel}, {self.col.value.data}")
        print_attributes(printer, self, ("sym_name", "channel_dir", "channel_index", "col"))


STREAMS: list[type[Operation]] = [
    Flow,
    PacketFlow,
    PacketSource,
    PacketDest,
    CascadeFlow,
    ShimDmaAllocation,
]
