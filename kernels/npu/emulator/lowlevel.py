"""DMA programs and streams that a design writes itself: `aie.mem` and its like, `aie.flow`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, cycle, repeat

from xdsl.ir import Operation

from uq.errors import DesignError
from uq.kernels.npu.dialect.attributes import Action, Bundle, Dimension, Direction
from uq.kernels.npu.dialect.dma import Dma, DmaBd, NextBd
from uq.kernels.npu.dialect.streams import Flow
from uq.kernels.npu.dialect.structure import UseLock
from uq.kernels.npu.dialect.text import integer, memref_type
from uq.kernels.npu.emulator.array import Array
from uq.kernels.npu.emulator.memory import width_of
from uq.kernels.npu.emulator.scheduler import Lock
from uq.kernels.npu.emulator.streams import Bytes, Descriptor, Port, Stream, Walk
from uq.kernels.npu.model import Channel, elements, place_of
from uq.kernels.npu.target import Kind, Place
from uq.kernels.npu.tasks import Line

End = tuple[Place | None, int]  # a tile and the number of its DMA channel


def start_channels(array: Array) -> None:
    """Channels with a program of their own, and those of shim tiles that wait for tasks."""
    ports = _ports(array)
    channels = [channel for channel in array.design.channels if channel.place is not None]
    programmed = {_line((c.place, c.index), c.direction): c for c in channels}
    for line, channel in programmed.items():
        if line not in ports:
            raise DesignError(f"{line.direction} {line.index} of {line.place} has no aie.flow")
        descriptors = [descriptor(array, ops) for ops in channel.blocks]
        released = [d.release[0] for d in descriptors if d.release is not None]
        name = f"channel {line.index} of {line.place}"
        array.add_channel(name, ports[line], _order(channel, descriptors), released)
    for line, port in ports.items():
        if line not in programmed and array.design.kind(line.place) is Kind.SHIM:
            array.add_queue(line, f"channel {line.index} of {line.place}", port)


def _ports(array: Array) -> Mapping[Line, Port]:
    """Both ends of every stream of `aie.flow`; flows of one source are one broadcast."""
    routes: defaultdict[End, list[End]] = defaultdict(list)
    for op in array.design.ops(Flow):
        if {op.source_bundle.data, op.dest_bundle.data} != {Bundle.DMA}:
            raise DesignError("an aie.flow between other ports than DMA is not emulated")
        source = place_of(op.source), op.source_channel.value.data
        routes[source].append((place_of(op.dest), op.dest_channel.value.data))
    ports: dict[Line, Port] = {}
    for source, sinks in routes.items():
        name = f"the stream from channel {source[1]} of {source[0]}"
        stream = Stream(array.scheduler, name, sinks=len(sinks))
        ports[_line(source, Direction.MM2S)] = Port(stream)
        for number, sink in enumerate(sinks):
            ports[_line(sink, Direction.S2MM)] = Port(stream, number)
    return ports


def _line(end: End, direction: Direction) -> Line:
    place, index = end
    if place is None:
        raise DesignError("an aie.flow ends at a value that is no tile")
    return Line(place, direction, index=index)


def _order(channel: Channel, descriptors: Sequence[Descriptor]) -> Iterable[Descriptor]:
    """A chain that leads back to itself runs for ever; another one `repeat` times more."""
    if isinstance(channel.op, Dma) and integer(channel.op.loop) != 0:
        return cycle(descriptors)
    last = channel.blocks[-1][-1] if channel.blocks else None
    if isinstance(last, NextBd):
        again = [index for index, ops in enumerate(channel.blocks) if ops[0].parent is last.dest]
        if again:
            return chain(descriptors, cycle(descriptors[again[0] :]))
    return chain.from_iterable(repeat(list(descriptors), channel.repeat + 1))


def descriptor(array: Array, ops: Iterable[Operation], host: Bytes | None = None) -> Descriptor:
    """One block of a DMA program: its descriptor and what it acquires and releases."""
    acquire: tuple[Lock, int] | None = None
    release: tuple[Lock, int] | None = None
    way: Walk | None = None
    for op in ops:
        if isinstance(op, UseLock):
            amount = 1 if op.value is None else op.value.value.data
            if op.action.data is Action.Release:
                release = array.locks[op.lock], amount
            else:
                acquire = array.locks[op.lock], amount
        elif isinstance(op, DmaBd):
            data = array.buffers[op.buffer].data if host is None else host
            way = _walk(op, data)
    if way is None:
        raise DesignError("a block of a DMA program has no descriptor")
    return Descriptor(way, acquire, release)


def _walk(op: DmaBd, data: Bytes) -> Walk:
    kind = memref_type(op.buffer)
    length = integer(op.len)
    linear = (Dimension(elements(kind) if length is None else length, 1),)
    layout = op.dimensions.data if op.dimensions is not None and op.dimensions.data else linear
    pads = op.pad_dimensions.data if op.pad_dimensions is not None else ()
    offset, fill = integer(op.offset) or 0, integer(op.pad_value) or 0
    return Walk(data, width_of(kind), offset, layout, pads, fill)


def blocks_of(op: Operation) -> Iterator[Sequence[Operation]]:
    """The blocks of a task, in order, that hold a descriptor."""
    for region in op.regions:
        for block in region.blocks:
            if any(isinstance(inner, DmaBd) for inner in block.ops):
                yield tuple(block.ops)
