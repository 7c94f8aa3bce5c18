"""Object FIFOs as rings, locks and channels, as the FIFO pass of mlir-aie lowers them.

Between neighbours a FIFO is one ring in shared memory. Elsewhere each end has a ring and a DMA
channel, and the FIFOs of a link work on the parts of one ring.
"""

from __future__ import annotations

from itertools import cycle

from xdsl.dialects.builtin import ArrayAttr

from uq.errors import DesignError
from uq.kernels.npu.dialect.attributes import Dimension, Direction
from uq.kernels.npu.dialect.attributes import Port as FifoPort
from uq.kernels.npu.dialect.text import integer
from uq.kernels.npu.emulator.array import Array, Ring
from uq.kernels.npu.emulator.memory import memory, width_of
from uq.kernels.npu.emulator.streams import Bytes, Descriptor, Port, Stream, Walk
from uq.kernels.npu.model import Fifo, FifoLink, nbytes
from uq.kernels.npu.resources import lowered_depth, shared_at
from uq.kernels.npu.target import Kind, Place
from uq.kernels.npu.tasks import Line

REFUSED = ("plio", "disable_synchronization", "via_shared_mem")


def start_fifos(array: Array) -> None:
    streams: dict[str, Stream] = {}
    for fifo in array.design.fifos.values():
        _check(fifo)
        if (place := shared_at(array.design, fifo)) is not None:
            _share(array, fifo, place)
            continue
        name, sinks = f"the stream of @{fifo.name}", len(fifo.consumers)
        streams[fifo.name] = Stream(array.scheduler, name, sinks=sinks)
        for sink, end in enumerate((fifo.producer, *fifo.consumers), start=-1):
            _start_end(array, fifo, end, Port(streams[fifo.name], None if sink < 0 else sink))
    for link in array.design.links:
        _start_link(array, link, streams)


def _check(fifo: Fifo) -> None:
    for name in REFUSED:
        if name in fifo.op.properties:
            raise DesignError(f"@{fifo.name}: {name} is not emulated")


def _share(array: Array, fifo: Fifo, place: Place) -> None:
    ends = (fifo.producer, *fifo.consumers)
    depth = max(lowered_depth(array.design, fifo, end) for end in ends)
    ring = _ring(array, fifo, place, depth)
    for end, port in zip(ends, (FifoPort.Produce, FifoPort.Consume), strict=True):
        array.rings[fifo.name, port, end] = ring


def _start_end(array: Array, fifo: Fifo, place: Place | None, port: Port) -> None:
    """An end of its own: the sequence's, a core's or a mem tile's. Ends in links come later."""
    sends = port.sink is None
    if array.design.kind(place) is Kind.SHIM and place is not None:
        direction = Direction.MM2S if sends else Direction.S2MM
        array.add_queue(Line(place, direction, fifo.name), f"@{fifo.name} at {place}", port)
    elif array.design.link_at(fifo, place) is None:
        ring = _ring(array, fifo, place, lowered_depth(array.design, fifo, place))
        array.rings[fifo.name, FifoPort.Produce if sends else FifoPort.Consume, place] = ring
        parts = [(entry.data, ring) for entry in ring.objects]
        _start_channel(array, fifo, place, port, parts)


def _start_link(array: Array, link: FifoLink, streams: dict[str, Stream]) -> None:
    place, whole = link.place, link.whole
    depth = whole.end_depth(place)
    objects = [memory(whole.element) for _ in range(depth)]
    name = f"@{whole.name} at {place}"
    parts: list[list[tuple[Bytes, Ring]]] = []  # of each part, by object
    for index, (start, size) in enumerate(_places(link)):
        ring = array.ring(f"{name}, part {index}" if link.parts > 1 else name, (), depth)
        parts.append([(entry.data[start : start + size], ring) for entry in objects])
    for side in (link.inputs, link.outputs):
        for index, fifo in enumerate(side):
            in_order = [part[n] for n in range(depth) for part in parts]
            sink = fifo.consumers.index(place) if side is link.inputs else None
            pieces = in_order if len(side) == 1 else parts[index]
            _start_channel(array, fifo, place, Port(streams[fifo.name], sink), pieces)


def _places(link: FifoLink) -> list[tuple[int, int]]:
    """First byte and size of each part of the whole object."""
    many = link.inputs if len(link.inputs) > 1 else link.outputs
    if link.parts == 1:
        return [(0, nbytes(link.whole.element))]
    offsets = link.op.src_offsets if len(link.inputs) > 1 else link.op.dst_offsets
    width = width_of(link.whole.element)
    starts = [offset.value.data * width for offset in offsets]
    return [(start, nbytes(fifo.element)) for start, fifo in zip(starts, many, strict=True)]


def _start_channel(
    array: Array, fifo: Fifo, place: Place | None, port: Port, pieces: list[tuple[Bytes, Ring]]
) -> None:
    """A DMA channel that goes round the pieces of memory of this end."""
    layout = fifo.layout(place).data
    if layout and any(data.size != nbytes(fifo.element) for data, _ in pieces):
        raise DesignError(f"@{fifo.name}: a layout of parts of its objects is not emulated")
    filling = port.sink is not None
    times = 1 if filling else integer(fifo.op.repeat_count) or 1
    descriptors = []
    for data, ring in pieces:
        acquire, release = ring.turn(filling)
        width = width_of(fifo.element)
        way = Walk(data, width, 0, layout or [Dimension(data.size // width, 1)])
        descriptors.append(Descriptor(way, acquire, release, times))
    released = [d.release[0] for d in descriptors if d.release is not None]
    array.add_channel(f"@{fifo.name} at {place}", port, cycle(descriptors), released)


def _ring(array: Array, fifo: Fifo, place: Place | None, depth: int) -> Ring:
    initial = fifo.op.init_values if place == fifo.producer else None
    values = list(initial) if isinstance(initial, ArrayAttr) else []
    if len(values) > depth:
        raise DesignError(f"@{fifo.name}: {len(values)} initial values for {depth} objects")
    objects = [memory(fifo.element, value) for value in [*values, *[None] * (depth - len(values))]]
    ring = array.ring(f"@{fifo.name} at {place}", objects, depth)
    ring.free.value, ring.full.value = depth - len(values), len(values)
    return ring
