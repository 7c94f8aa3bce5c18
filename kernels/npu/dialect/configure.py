"""`aiex` operations that configure: whole devices, and buffer descriptors field by field."""

from __future__ import annotations

from xdsl.dialects.builtin import IntegerAttr, SymbolRefAttr, i32
from xdsl.ir import Operation
from xdsl.irdl import (
    IRDLOperation,
    ParsePropInAttrDict,
    irdl_op_definition,
    opt_prop_def,
    prop_def,
    region_def,
    traits_def,
    var_operand_def,
)
from xdsl.parser import Parser
from xdsl.printer import Printer
from xdsl.traits import HasParent, NoTerminator

from uq.kernels.npu.dialect.structure import LegacyRuntimeSequence, RuntimeSequence
from uq.kernels.npu.dialect.text import (
    flat,
    parse_attributes,
    parse_region,
    print_attributes,
    print_region,
)

FIELD = IntegerAttr.constr(type=i32)


@irdl_op_definition
class Configure(IRDLOperation):
    """`aiex.configure @device { ... }`: what follows runs on that device of the module."""

    name = "aiex.configure"
    symbol = prop_def(SymbolRefAttr)
    body = region_def("single_block")
    traits = traits_def(NoTerminator(), HasParent(RuntimeSequence, LegacyRuntimeSequence))

    @classmethod
    def parse(cls, parser: Parser) -> Configure:
        symbol = SymbolRefAttr(parser.parse_symbol_name())
        body = parse_region(parser)
        properties, attributes = parse_attributes(parser, cls, {"symbol": symbol})
        return cls.create(properties=properties, attributes=attributes, regions=[body])

    def print(self, printer: Printer) -> None:
        printer.print_string(" ")
        printer.print_symbol_name(flat(self.symbol))
        print_region(printer, self.body)
        print_attributes(printer, self, ("symbol",))


@irdl_op_definition
class Run(IRDLOperation):
    """`aiex.run @sequence(%buffer) : (memref<4xi32>)`: a sequence of the configured device."""

    name = "aiex.run"
    sequence = prop_def(SymbolRefAttr, prop_name="runtime_sequence_symbol")
    args = var_operand_def()
    traits = traits_def(HasParent(Configure))

    @classmethod
    def parse(cls, parser: Parser) -> Run:
        written = {"runtime_sequence_symbol": SymbolRefAttr(parser.parse_symbol_name())}
        operands = parser.parse_comma_separated_list(
            parser.Delimiter.PAREN, parser.parse_unresolved_operand
        )
        parser.parse_punctuation(":")
        at = parser.pos
        types = parser.parse_comma_separated_list(parser.Delimiter.PAREN, parser.parse_type)
        properties, attributes = parse_attributes(parser, cls, written)
        resolved = parser.resolve_operands(operands, types, at)
        return cls.create(operands=resolved, properties=properties, attributes=attributes)

    def print(self, printer: Printer) -> None:
        printer.print_string(" ")
        printer.print_symbol_name(flat(self.sequence))
        with printer.in_parens():
            printer.print_list(self.args, printer.print_operand)
        printer.print_string(" : ")
        with printer.in_parens():
            printer.print_list(self.args.types, printer.print_attribute)
        print_attributes(printer, self, ("runtime_sequence_symbol",))


@irdl_op_definition
class LoadPdi(IRDLOperation):
    """Load another image: by the name of its device, or by its number in the xclbin."""

    name = "aiex.npu.load_pdi"
    device_ref = opt_prop_def(SymbolRefAttr)
    id = opt_prop_def(IntegerAttr)
    size = opt_prop_def(IntegerAttr)
    address = opt_prop_def(IntegerAttr)
    assembly_format = "attr-dict"
    irdl_options = (ParsePropInAttrDict(),)


@irdl_op_definition
class WriteBd(IRDLOperation):
    """Write all fields of one buffer descriptor; lengths and strides in 32-bit words."""

    name = "aiex.npu.writebd"
    column = prop_def(FIELD)
    row = prop_def(FIELD)
    bd_id = prop_def(FIELD)
    buffer_length = prop_def(FIELD)
    buffer_offset = prop_def(FIELD)
    enable_packet = prop_def(FIELD)
    out_of_order_id = prop_def(FIELD)
    packet_id = prop_def(FIELD)
    packet_type = prop_def(FIELD)
    d0_size = prop_def(FIELD)
    d0_stride = prop_def(FIELD)
    d1_size = prop_def(FIELD)
    d1_stride = prop_def(FIELD)
    d2_size = prop_def(FIELD)
    d2_stride = prop_def(FIELD)
    iteration_current = prop_def(FIELD)
    iteration_size = prop_def(FIELD)
    iteration_stride = prop_def(FIELD)
    next_bd = prop_def(FIELD)
    use_next_bd = prop_def(FIELD)
    valid_bd = prop_def(FIELD)
    lock_rel_val = prop_def(FIELD)
    lock_rel_id = prop_def(FIELD)
    lock_acq_enable = prop_def(FIELD)
    lock_acq_val = prop_def(FIELD)
    lock_acq_id = prop_def(FIELD)
    d0_zero_before = prop_def(FIELD)
    d1_zero_before = prop_def(FIELD)
    d2_zero_before = prop_def(FIELD)
    d0_zero_after = prop_def(FIELD)
    d1_zero_after = prop_def(FIELD)
    d2_zero_after = prop_def(FIELD)
    burst_length = opt_prop_def(FIELD)
    assembly_format = "attr-dict"
    irdl_options = (ParsePropInAttrDict(),)

    def field(self, name: str) -> int:
        value = self.properties.get(name)
        return value.value.data if isinstance(value, IntegerAttr) else 0


CONFIGURE: list[type[Operation]] = [Configure, Run, LoadPdi, WriteBd]
