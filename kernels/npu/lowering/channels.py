"""The shim channel behind a name, as the FIFO pass of mlir-aie assigns channels."""

from __future__ import annotations

from typing import NamedTuple

from uq.errors import DesignError
from uq.kernels.npu.dialect.attributes import Direction, PacketInfoAttr
from uq.kernels.npu.dialect.structure import ShimDma
from uq.kernels.npu.dialect.text import integer
from uq.kernels.npu.model import Design, allocation_place
from uq.kernels.npu.resources import shared_at
from uq.kernels.npu.target import Kind, Place


class Channel(NamedTuple):
    place: Place
    direction: Direction
    number: int
    packet: PacketInfoAttr | None = None


def shim_channels(design: Design) -> dict[str, Channel]:
    """By the name of an allocation, or of a FIFO that ends or begins at a shim tile.

    FIFOs take the lowest free channel of their tile in the order of the text. Channels that a
    program of the shim tile starts are taken; those of a bare aie.flow are not seen.
    """
    taken = {
        (channel.place, channel.direction, channel.index)
        for channel in design.channels
        if isinstance(channel.op.parent_op(), ShimDma)
    }
    found: dict[str, Channel] = {}
    for fifo in design.fifos.values():
        ends = [(fifo.producer, Direction.MM2S)]
        ends += [(consumer, Direction.S2MM) for consumer in fifo.consumers]
        for place, direction in ends:
            if design.kind(place) is not Kind.SHIM or place is None or shared_at(design, fifo):
                continue
            index = 0
            while (place, direction, index) in taken:
                index += 1
            taken.add((place, direction, index))
            found[fifo.name] = Channel(place, direction, index)
    for name, op in design.allocations.items():
        place, number = allocation_place(op), integer(op.channel_index)
        if place is None or number is None:
            raise DesignError(f"shim_dma_allocation @{name} names no tile and channel")
        found[name] = Channel(place, op.channel_dir.data, number)
    return found
