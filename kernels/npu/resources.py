"""What a design takes of every tile: buffers, descriptors, locks and DMA channels.

Object FIFOs are counted as the FIFO pass of mlir-aie lowers them (March 2026): between
neighbours they become shared buffers, elsewhere two ends with a DMA channel each, and linked
FIFOs share the buffers of their common tile.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from uq.kernels.npu.dialect.attributes import Direction
from uq.kernels.npu.dialect.dma import DmaBd
from uq.kernels.npu.dialect.sequence import MemcpyNd
from uq.kernels.npu.dialect.text import flat, integer
from uq.kernels.npu.model import (
    CoreProgram,
    Design,
    Fifo,
    FifoLink,
    allocation_place,
    nbytes,
    place_of,
)
from uq.kernels.npu.target import Kind, Place

LOCKS_PER_END = 2  # one counts free objects, one counts full ones
INDEX_BYTES = 4  # per FIFO end of a core that chooses its objects at run time


@dataclass
class Usage:
    """Of one tile.

    Attributes:
        buffers, nbytes: their number and their bytes together, without the stack.
        descriptors: buffer descriptors; on a shim tile the ids that the sequence uses.
        named: channel numbers that the design itself gives; FIFOs take others.
    """

    buffers: int = 0
    nbytes: int = 0
    descriptors: int = 0
    locks: int = 0
    streams: dict[Direction, int] = field(default_factory=lambda: dict.fromkeys(Direction, 0))
    named: dict[Direction, set[int]] = field(default_factory=lambda: {d: set() for d in Direction})

    def add_buffers(self, nbytes: int, count: int = 1) -> None:
        self.buffers += count
        self.nbytes += nbytes * count

    def channels(self, direction: Direction) -> int:
        return self.streams[direction] + len(self.named[direction])


Tiles = Mapping[Place | None, Usage]


def usage(design: Design) -> Mapping[Place, Usage]:
    """Tiles that the design declares, in the order of their columns and rows."""
    places = sorted({Place(tile.col.value.data, tile.row.value.data) for tile in design.tiles})
    tiles: Tiles = {place: Usage() for place in places}
    _count_declared(design, tiles)
    for fifo in design.fifos.values():
        _count_fifo(design, fifo, tiles)
    for link in design.links:
        _count_link(link, tiles)
    for core in design.cores:
        if core.place is not None and core.dynamic and (ends := _ends_used(core)):
            tiles[core.place].add_buffers(INDEX_BYTES * ends)
    _count_sequences(design, tiles)
    return {place: tiles[place] for place in places}


def shared_at(design: Design, fifo: Fifo) -> Place | None:
    """The tile with the buffers of a FIFO that needs no DMA: its two ends are neighbours."""
    if fifo.producer is None or len(fifo.consumers) != 1 or fifo.consumers[0] is None:
        return None
    producer, consumer = fifo.producer, fifo.consumers[0]
    if fifo.op.to_stream.data or fifo.layout(consumer).data or integer(fifo.op.via_dma):
        return None
    linked = any(fifo in (*link.inputs, *link.outputs) for link in design.links)
    if linked or fifo.op.repeat_count is not None:
        return None
    if design.target.reaches(consumer, producer):
        return producer
    return consumer if design.target.reaches(producer, consumer) else None


def lowered_depth(design: Design, fifo: Fifo, place: Place | None) -> int:
    """Objects at this end. A single depth is a hint: a core gets what it acquires plus one."""
    depth = fifo.end_depth(place)
    core = design.core_at.get(place) if place is not None else None
    most = core.most_acquired(fifo.name) if core else 0
    if len(fifo.depths) > 1 or not most:
        return depth
    return 1 if depth == most == 1 else most + 1


def _count_declared(design: Design, tiles: Tiles) -> None:
    for buffer in design.buffers:
        if (place := place_of(buffer.tile)) in tiles:
            tiles[place].add_buffers(nbytes(buffer.buffer.type))
    for lock in design.locks:
        if (place := place_of(lock.tile)) in tiles:
            tiles[place].locks += 1
    for program in design.programs:
        if (place := place_of(program.tile)) in tiles:
            tiles[place].descriptors += sum(isinstance(op, DmaBd) for op in program.walk())
    for channel in design.channels:
        if channel.place in tiles:
            tiles[channel.place].named[channel.direction].add(channel.index)
    for allocation in design.allocations.values():
        if (place := allocation_place(allocation)) in tiles:
            direction = allocation.channel_dir.data
            tiles[place].named[direction].add(allocation.channel_index.value.data)


def _count_fifo(design: Design, fifo: Fifo, tiles: Tiles) -> None:
    if (place := shared_at(design, fifo)) is not None:
        depth = max(lowered_depth(design, fifo, end) for end in (fifo.producer, *fifo.consumers))
        _count_objects(fifo, depth, tiles[place])
        return
    for end, direction in _ends(fifo):
        if end not in tiles:
            continue
        tiles[end].streams[direction] += 1
        if design.link_at(fifo, end) is not None:
            continue
        if design.kind(end) is Kind.SHIM:
            tiles[end].locks += _locks(fifo)
        else:
            depth = lowered_depth(design, fifo, end)
            _count_objects(fifo, depth, tiles[end])
            tiles[end].descriptors += depth


def _count_link(link: FifoLink, tiles: Tiles) -> None:
    """A distribute or join has one descriptor per part and object, on both sides."""
    if (place := link.place) not in tiles or place is None:
        return
    depth = link.whole.end_depth(place)
    tiles[place].add_buffers(nbytes(link.whole.element), depth)
    tiles[place].locks += _locks(link.whole) * link.parts
    tiles[place].descriptors += 2 * link.parts * depth


def _count_sequences(design: Design, tiles: Tiles) -> None:
    ids: defaultdict[Place | None, set[int]] = defaultdict(set)
    for sequence in design.sequences:
        for op in sequence.walk():
            if isinstance(op, MemcpyNd) and (place := shim_of(design, flat(op.metadata))) in tiles:
                ids[place].add(op.id.value.data)
    for place, used in ids.items():
        tiles[place].descriptors += len(used)


def shim_of(design: Design, name: str) -> Place | None:
    """The shim tile behind a FIFO or an allocation."""
    if name in design.allocations:
        return allocation_place(design.allocations[name])
    fifo = design.fifos.get(name)
    ends = (fifo.producer, *fifo.consumers) if fifo else ()
    return next((end for end in ends if design.kind(end) is Kind.SHIM), None)


def _count_objects(fifo: Fifo, depth: int, tile: Usage) -> None:
    tile.add_buffers(nbytes(fifo.element), depth)
    tile.locks += _locks(fifo)


def _locks(fifo: Fifo) -> int:
    return 0 if integer(fifo.op.disable_synchronization) else LOCKS_PER_END


def _ends(fifo: Fifo) -> Iterator[tuple[Place | None, Direction]]:
    yield fifo.producer, Direction.MM2S
    for consumer in fifo.consumers:
        yield consumer, Direction.S2MM


def _ends_used(core: CoreProgram) -> int:
    return len({(flat(op.fifo), op.port.data) for op in core.accesses})
