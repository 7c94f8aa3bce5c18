"""Types and attributes of the `aie` dialect: what stands between the brackets of its operations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from xdsl.dialects.builtin import MemRefType
from xdsl.dialects.utils.enum_attribute import EnumAttribute
from xdsl.ir import (
    Attribute,
    Data,
    ParametrizedAttribute,
    SpacedOpaqueSyntaxAttribute,
    TypeAttribute,
)
from xdsl.irdl import irdl_attr_definition
from xdsl.parser import AttrParser
from xdsl.printer import Printer
from xdsl.utils.str_enum import StrEnum


class Direction(StrEnum):
    S2MM = "S2MM"
    MM2S = "MM2S"


class Port(StrEnum):
    Produce = "Produce"
    Consume = "Consume"


class Action(StrEnum):
    Acquire = "Acquire"
    AcquireGreaterEqual = "AcquireGreaterEqual"
    Release = "Release"


class Bundle(StrEnum):
    """The kinds of ports of a stream switch."""

    Core = "Core"
    DMA = "DMA"
    FIFO = "FIFO"
    South = "South"
    West = "West"
    North = "North"
    East = "East"
    PLIO = "PLIO"
    NOC = "NOC"
    Trace = "Trace"
    TileControl = "TileControl"


@irdl_attr_definition
class DirectionAttr(EnumAttribute[Direction], SpacedOpaqueSyntaxAttribute):
    name = "aie.channel_dir"


@irdl_attr_definition
class PortAttr(EnumAttribute[Port], SpacedOpaqueSyntaxAttribute):
    name = "aie.port"


@irdl_attr_definition
class ActionAttr(EnumAttribute[Action], SpacedOpaqueSyntaxAttribute):
    name = "aie.lock_action"


@irdl_attr_definition
class BundleAttr(EnumAttribute[Bundle], SpacedOpaqueSyntaxAttribute):
    """Written bare, or in quotes as older designs do."""

    name = "aie.wire_bundle"

    @classmethod
    def parse_parameter(cls, parser: AttrParser) -> Bundle:
        if (quoted := parser.parse_optional_str_literal()) is None:
            return parser.parse_str_enum(Bundle)
        if quoted not in set(Bundle):
            parser.raise_error(f"unknown port {quoted!r}; one of {', '.join(Bundle)}")
        return Bundle(quoted)


@irdl_attr_definition
class ObjectFifoType(ParametrizedAttribute, TypeAttribute):
    name = "aie.objectfifo"
    element: MemRefType


@irdl_attr_definition
class SubviewType(ParametrizedAttribute, TypeAttribute):
    name = "aie.objectfifosubview"
    element: MemRefType


class Dimension(NamedTuple):
    """One step of an address generator; both in elements of the buffer."""

    size: int
    stride: int


class Padding(NamedTuple):
    """Elements of zero before and after one dimension."""

    before: int
    after: int


class PacketInfo(NamedTuple):
    type: int
    id: int


@irdl_attr_definition
class DimensionsAttr(Data[tuple[Dimension, ...]]):
    """A layout, slowest dimension first: `[<size = 16, stride = 4>, <size = 4, stride = 1>]`."""

    name = "aie.bd_dim_layout_array"

    @classmethod
    def parse_parameter(cls, parser: AttrParser) -> tuple[Dimension, ...]:
        return tuple(Dimension(*pair) for pair in _parse_pairs(parser, ("size", "stride")))

    def print_parameter(self, printer: Printer) -> None:
        _print_pairs(printer, ("size", "stride"), self.data)


@irdl_attr_definition
class PaddingsAttr(Data[tuple[Padding, ...]]):
    name = "aie.bd_pad_layout_array"

    @classmethod
    def parse_parameter(cls, parser: AttrParser) -> tuple[Padding, ...]:
        names = ("const_pad_before", "const_pad_after")
        return tuple(Padding(*pair) for pair in _parse_pairs(parser, names))

    def print_parameter(self, printer: Printer) -> None:
        _print_pairs(printer, ("const_pad_before", "const_pad_after"), self.data)


@irdl_attr_definition
class PacketInfoAttr(Data[PacketInfo]):
    """`#aie.packet_info<pkt_type = 0, pkt_id = 4>`, in either order."""

    name = "aie.packet_info"

    @classmethod
    def parse_parameter(cls, parser: AttrParser) -> PacketInfo:
        values = parser.parse_comma_separated_list(
            parser.Delimiter.ANGLE, lambda: _parse_named(parser, ("pkt_type", "pkt_id"))
        )
        found = dict(values)
        if len(values) != 2 or len(found) != 2:
            parser.raise_error("packet_info takes pkt_type and pkt_id, each once")
        return PacketInfo(found["pkt_type"], found["pkt_id"])

    def print_parameter(self, printer: Printer) -> None:
        printer.print_string(f"<pkt_type = {self.data.type}, pkt_id = {self.data.id}>")


def _parse_named(parser: AttrParser, names: Sequence[str]) -> tuple[str, int]:
    name = parser.parse_identifier()
    if name not in names:
        parser.raise_error(f"unknown field {name!r}; expected {' or '.join(names)}")
    parser.parse_punctuation("=")
    return name, parser.parse_integer(allow_boolean=False)


def _parse_pairs(parser: AttrParser, names: tuple[str, str]) -> list[tuple[int, int]]:
    def pair() -> tuple[int, int]:
        parser.parse_punctuation("<")
        _, first = _parse_named(parser, names[:1])
        parser.parse_punctuation(",")
        _, second = _parse_named(parser, names[1:])
        parser.parse_punctuation(">")
        return first, second

    return parser.parse_comma_separated_list(parser.Delimiter.SQUARE, pair)


def _print_pairs(
    printer: Printer, names: tuple[str, str], pairs: Sequence[tuple[int, int]]
) -> None:
    items = (f"<{names[0]} = {a}, {names[1]} = {b}>" for a, b in pairs)
    printer.print_string(f"[{', '.join(items)}]")


ATTRIBUTES: list[type[Attribute]] = [
    DirectionAttr,
    PortAttr,
    ActionAttr,
    BundleAttr,
    ObjectFifoType,
    SubviewType,
    DimensionsAttr,
    PaddingsAttr,
    PacketInfoAttr,
]
