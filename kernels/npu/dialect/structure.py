"""`aie` operations that place things: devices, tiles, cores, buffers, locks, sequences."""

from __future__ import annotations

from xdsl.dialects.builtin import (
    I32,
    BoolAttr,
    DenseIntOrFPElementsAttr,
    IndexType,
    IntegerAttr,
    MemRefType,
    StringAttr,
    SymbolNameConstraint,
    i32,
)
from xdsl.ir import Operation, Region
from xdsl.irdl import (
    IRDLOperation,
    ParsePropInAttrDict,
    irdl_op_definition,
    operand_def,
    opt_prop_def,
    prop_def,
    region_def,
    result_def,
    traits_def,
)
from xdsl.parser import Parser
from xdsl.printer import Printer
from xdsl.traits import (
    IsolatedFromAbove,
    IsTerminator,
    NoTerminator,
    OptionalSymbolOpInterface,
    SingleBlockImplicitTerminator,
    SymbolTable,
    ensure_terminator,
)

from uq.kernels.npu.dialect.attributes import (
    ActionAttr,
    PacketInfoAttr,
)
from uq.kernels.npu.dialect.text import (
    of_type,
    parse_attributes,
    parse_dense,
    parse_region,
    print_attributes,
    print_dense,
    print_region,
)

CHANNEL = IntegerAttr.constr(type=i32)


@irdl_op_definition
class End(IRDLOperation):
    name = "aie.end"
    traits = traits_def(IsTerminator())
    assembly_format = "attr-dict"


def close_region(op: Operation, region: Region) -> None:
    """Add the `aie.end` that the text may leave out. A copy is made with empty regions first."""
    if len(region.blocks) == 1 and region.block.ops:
        ensure_terminator(op, SingleBlockImplicitTerminator(End))


@irdl_op_definition
class Device(IRDLOperation):
    """One design for a whole device: `aie.device(npu1) @main { ... }`."""

    name = "aie.device"
    device = prop_def(StringAttr)
    sym_name = opt_prop_def(SymbolNameConstraint())
    body = region_def("single_block")
    traits = traits_def(NoTerminator(), IsolatedFromAbove(), SymbolTable())

    @classmethod
    def parse(cls, parser: Parser) -> Device:
        with parser.in_parens():
            device = StringAttr(parser.parse_identifier())
        name = parser.parse_optional_symbol_name()
        body = parse_region(parser)
        written = {"device": device, "sym_name": name}
        properties, attributes = parse_attributes(parser, cls, written)
        return cls.create(properties=properties, attributes=attributes, regions=[body])

    def print(self, printer: Printer) -> None:
        printer.print_string(f"({self.device.data})")
        if self.sym_name is not None:
            printer.print_string(" ")
            printer.print_symbol_name(self.sym_name.data)
        print_region(printer, self.body)
        print_attributes(printer, self, ("device", "sym_name"))


@irdl_op_definition
class Tile(IRDLOperation):
    name = "aie.tile"
    col = prop_def(CHANNEL)
    row = prop_def(CHANNEL)
    controller_id = opt_prop_def(PacketInfoAttr)
    result = result_def(IndexType())
    assembly_format = "`(` $col `,` $row `)` attr-dict"
    irdl_options = (ParsePropInAttrDict(),)


class TileRegion(IRDLOperation):
    """What `aie.core`, `aie.mem`, `aie.memtile_dma` and `aie.shim_dma` have in common."""

    tile = operand_def(IndexType())
    body = region_def()
    result = result_def(IndexType())

    @classmethod
    def parse(cls, parser: Parser) -> TileRegion:
        with parser.in_parens():
            tile = parser.parse_operand(IndexType())
        body = parse_region(parser)
        properties, attributes = parse_attributes(parser, cls, {})
        return cls.create(
            operands=[tile],
            result_types=[IndexType()],
            properties=properties,
            attributes=attributes,
            regions=[body],
        )

    def print(self, printer: Printer) -> None:
        with printer.in_parens():
            printer.print_operand(self.tile)
        print_region(printer, self.body)
        print_attributes(printer, self)


@irdl_op_definition
class Core(TileRegion):
    """The program of one core. `link_with` names the object file of its kernels."""

    name = "aie.core"
    stack_size = opt_prop_def(IntegerAttr[I32])
    link_with = opt_prop_def(StringAttr)
    elf_file = opt_prop_def(StringAttr)
    dynamic_objfifo_lowering = opt_prop_def(BoolAttr)


@irdl_op_definition
class Mem(TileRegion):
    name = "aie.mem"


@irdl_op_definition
class MemTileDma(TileRegion):
    name = "aie.memtile_dma"


@irdl_op_definition
class ShimDma(TileRegion):
    name = "aie.shim_dma"


@irdl_op_definition
class Buffer(IRDLOperation):
    name = "aie.buffer"
    tile = operand_def(IndexType())
    sym_name = opt_prop_def(StringAttr)
    address = opt_prop_def(IntegerAttr[I32])
    mem_bank = opt_prop_def(IntegerAttr[I32])
    initial_value = opt_prop_def(DenseIntOrFPElementsAttr)
    buffer = result_def(MemRefType)
    traits = traits_def(OptionalSymbolOpInterface())

    @classmethod
    def parse(cls, parser: Parser) -> Buffer:
        with parser.in_parens():
            tile = parser.parse_operand(IndexType())
        properties, attributes = parse_attributes(parser, cls, {})
        parser.parse_punctuation(":")
        kind = parser.parse_type()
        if parser.parse_optional_punctuation("="):
            properties["initial_value"] = parse_dense(parser, kind)
        elif isinstance(value := properties.get("initial_value"), DenseIntOrFPElementsAttr):
            properties["initial_value"] = of_type(parser, value, kind)
        return cls.create(
            operands=[tile], result_types=[kind], properties=properties, attributes=attributes
        )

    def print(self, printer: Printer) -> None:
        with printer.in_parens():
            printer.print_operand(self.tile)
        print_attributes(printer, self, ("initial_value",))
        printer.print_string(" : ")
        printer.print_attribute(self.buffer.type)
        if self.initial_value is not None:
            printer.print_string(" = ")
            print_dense(printer, self.initial_value)


@irdl_op_definition
class Lock(IRDLOperation):
    name = "aie.lock"
    tile = operand_def(IndexType())
    lock_id = opt_prop_def(CHANNEL, prop_name="lockID")
    init = opt_prop_def(IntegerAttr[I32])
    sym_name = opt_prop_def(StringAttr)
    result = result_def(IndexType())
    traits = traits_def(OptionalSymbolOpInterface())
    assembly_format = "`(` $tile (`,` $lockID^)? `)` attr-dict"
    irdl_options = (ParsePropInAttrDict(),)


@irdl_op_definition
class UseLock(IRDLOperation):
    name = "aie.use_lock"
    lock = operand_def(IndexType())
    action = prop_def(ActionAttr)
    value = opt_prop_def(CHANNEL)
    acq_en = opt_prop_def(BoolAttr)
    assembly_format = "`(` $lock `,` $action (`,` $value^)? `)` attr-dict"
    irdl_options = (ParsePropInAttrDict(),)


class SequenceOperation(IRDLOperation):
    """The program of the command processor; its arguments are the buffers of the host."""

    sym_name = opt_prop_def(SymbolNameConstraint())
    body = region_def("single_block")
    traits = traits_def(NoTerminator(), OptionalSymbolOpInterface())

    @classmethod
    def parse(cls, parser: Parser) -> SequenceOperation:
        name = parser.parse_optional_symbol_name()
        arguments = parser.parse_comma_separated_list(parser.Delimiter.PAREN, parser.parse_argument)
        body = parse_region(parser, arguments)
        properties, attributes = parse_attributes(parser, cls, {"sym_name": name})
        return cls.create(properties=properties, attributes=attributes, regions=[body])

    def print(self, printer: Printer) -> None:
        if self.sym_name is not None:
            printer.print_string(" ")
            printer.print_symbol_name(self.sym_name.data)
        with printer.in_parens():
            printer.print_list(self.body.block.args, printer.print_block_argument)
        print_region(printer, self.body, arguments=False)
        print_attributes(printer, self, ("sym_name",))


@irdl_op_definition
class RuntimeSequence(SequenceOperation):
    name = "aie.runtime_sequence"


@irdl_op_definition
class LegacyRuntimeSequence(SequenceOperation):
    """The same operation under the name that it had until November 2025."""

    name = "aiex.runtime_sequence"


STRUCTURE: list[type[Operation]] = [
    End,
    Device,
    Tile,
    Core,
    Mem,
    MemTileDma,
    ShimDma,
    Buffer,
    Lock,
    UseLock,
    RuntimeSequence,
]
