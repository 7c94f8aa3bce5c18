"""A design as the verifier sees it: the operations of one device, gathered and resolved."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from xdsl.dialects.builtin import (
    ArrayAttr,
    FixedBitwidthType,
    IntegerAttr,
    MemRefType,
    SymbolRefAttr,
)
from xdsl.dialects.func import FuncOp
from xdsl.ir import Attribute, Operation, SSAValue

from uq.kernels.npu.dialect.attributes import DimensionsAttr, Direction
from uq.kernels.npu.dialect.dma import Dma, DmaBd, DmaStart, NextBd
from uq.kernels.npu.dialect.fifo import Acquire, Link, ObjectFifo, Release
from uq.kernels.npu.dialect.streams import ShimDmaAllocation
from uq.kernels.npu.dialect.structure import (
    Buffer,
    Core,
    Device,
    Lock,
    Mem,
    MemTileDma,
    SequenceOperation,
    ShimDma,
    Tile,
)
from uq.kernels.npu.dialect.text import flat, integer
from uq.kernels.npu.target import Kind, Place, Target

Op = TypeVar("Op", bound=Operation)
Program = Mem | MemTileDma | ShimDma


@dataclass(frozen=True)
class Fifo:
    """Depth: one for all ends, or the producer's and each consumer's."""

    op: ObjectFifo
    name: str
    producer: Place | None
    consumers: tuple[Place | None, ...]
    depths: tuple[int, ...]
    element: MemRefType

    def end_depth(self, place: Place | None) -> int:
        """The depth as written for the end at `place`."""
        if len(self.depths) == 1 or place == self.producer or place not in self.consumers:
            return self.depths[0]
        index = 1 + self.consumers.index(place)
        return self.depths[index] if index < len(self.depths) else self.depths[0]

    def layout(self, place: Place | None) -> DimensionsAttr:
        if place == self.producer:
            return self.op.to_stream
        return self.op.from_stream.data[self.consumers.index(place)]


@dataclass(frozen=True)
class FifoLink:
    """Unknown FIFOs are left out here; a rule of their own names them."""

    op: Link
    inputs: tuple[Fifo, ...]
    outputs: tuple[Fifo, ...]

    @property
    def place(self) -> Place | None:
        """The tile where all FIFOs meet: all inputs end there and all outputs begin."""
        places = {fifo.producer for fifo in self.outputs}
        shared = places.pop() if len(places) == 1 else None
        met = self.inputs and all(shared in fifo.consumers for fifo in self.inputs)
        return shared if met else None

    @property
    def parts(self) -> int:
        return max(len(self.inputs), len(self.outputs))

    @property
    def whole(self) -> Fifo:
        """The FIFO whose objects hold the parts of the others: its buffers are the shared ones."""
        if len(self.inputs) > 1:
            return self.outputs[0]
        first, last = self.inputs[0], self.outputs[0]
        larger = len(self.outputs) == 1 and nbytes(last.element) > nbytes(first.element)
        return last if larger else first


@dataclass(frozen=True)
class CoreProgram:
    op: Core
    place: Place | None
    accesses: tuple[Acquire | Release, ...]

    @property
    def dynamic(self) -> bool:
        """Objects are chosen at run time; otherwise loops are unrolled by the FIFO depth."""
        return bool(integer(self.op.dynamic_objfifo_lowering))

    @property
    def acquires(self) -> list[Acquire]:
        return [op for op in self.accesses if isinstance(op, Acquire)]

    def most_acquired(self, fifo: str) -> int:
        sizes = [op.size.value.data for op in self.acquires if flat(op.fifo) == fifo]
        return max(sizes, default=0)


@dataclass(frozen=True)
class Channel:
    """A DMA channel with its descriptors, block by block."""

    op: DmaStart | Dma
    place: Place | None
    direction: Direction
    index: int
    repeat: int
    blocks: tuple[tuple[Operation, ...], ...]


@dataclass(frozen=True)
class Design:
    device: Device
    target: Target
    tiles: tuple[Tile, ...]
    fifos: Mapping[str, Fifo]
    links: tuple[FifoLink, ...]
    cores: tuple[CoreProgram, ...]
    buffers: tuple[Buffer, ...]
    locks: tuple[Lock, ...]
    programs: tuple[Program, ...]
    channels: tuple[Channel, ...]
    allocations: Mapping[str, ShimDmaAllocation]
    sequences: tuple[SequenceOperation, ...]
    functions: Mapping[str, FuncOp]
    core_at: Mapping[Place, CoreProgram]
    reserved: int  # bytes of every core that tables and constants of its kernels take
    walked: tuple[Operation, ...]  # the device and all in it

    def ops(self, kind: type[Op]) -> Iterator[Op]:
        return _of(kind, self.walked)

    def in_sequences(self) -> Iterator[Operation]:
        for sequence in self.sequences:
            yield from sequence.walk()

    def kind(self, place: Place | None) -> Kind | None:
        return self.target.kind(place)

    def link_at(self, fifo: Fifo, place: Place | None) -> FifoLink | None:
        """The link that joins this end of the FIFO with others, if any."""
        for link in self.links:
            if link.place != place or place is None:
                continue
            if (fifo in link.outputs and place == fifo.producer) or fifo in link.inputs:
                return link
        return None


def place_of(tile: SSAValue) -> Place | None:
    """None when the value is not a tile."""
    op = tile.owner
    if not isinstance(op, Tile):
        return None
    return Place(op.col.value.data, op.row.value.data)


def allocation_place(op: ShimDmaAllocation) -> Place | None:
    if op.tile is not None:
        return place_of(op.tile)
    return None if op.col is None else Place(op.col.value.data, 0)


def element_bits(kind: MemRefType) -> int:
    """Bits of one element; 0 when the type has no fixed width."""
    element = kind.element_type
    return element.bitwidth if isinstance(element, FixedBitwidthType) else 0


def elements(kind: MemRefType) -> int:
    """Number of elements; 0 for a dynamic shape."""
    total = 1
    for size in kind.get_shape():
        total *= max(size, 0)
    return total


def nbytes(kind: MemRefType) -> int:
    return -(-elements(kind) * element_bits(kind) // 8)


def gather(device: Device, target: Target, *, reserved: int = 0) -> Design:
    found = tuple(device.walk())
    fifos = {op.sym_name.data: _fifo(op) for op in _of(ObjectFifo, found)}
    cores = tuple(_core(op) for op in _of(Core, found))
    programs = tuple(op for op in found if isinstance(op, Mem | MemTileDma | ShimDma))
    return Design(
        device=device,
        target=target,
        tiles=tuple(_of(Tile, found)),
        fifos=fifos,
        links=tuple(_link(op, fifos) for op in _of(Link, found)),
        cores=cores,
        buffers=tuple(_of(Buffer, found)),
        locks=tuple(_of(Lock, found)),
        programs=programs,
        channels=tuple(channel for op in programs for channel in _channels(op)),
        allocations={op.sym_name.data: op for op in _of(ShimDmaAllocation, found)},
        sequences=tuple(op for op in device.body.block.ops if isinstance(op, SequenceOperation)),
        functions={op.sym_name.data: op for op in _of(FuncOp, found)},
        core_at={core.place: core for core in cores if core.place is not None},
        reserved=reserved,
        walked=found,
    )


def _of(kind: type[Op], found: Sequence[Operation]) -> Iterator[Op]:
    return (op for op in found if isinstance(op, kind))


def _fifo(op: ObjectFifo) -> Fifo:
    depths: Sequence[Attribute] = op.depth.data if isinstance(op.depth, ArrayAttr) else [op.depth]
    return Fifo(
        op=op,
        name=op.sym_name.data,
        producer=place_of(op.producer),
        consumers=tuple(place_of(tile) for tile in op.consumers),
        depths=tuple(depth.value.data for depth in depths if isinstance(depth, IntegerAttr))
        or (0,),
        element=op.fifo_type.element,
    )


def _core(op: Core) -> CoreProgram:
    accesses = tuple(use for use in op.walk() if isinstance(use, Acquire | Release))
    return CoreProgram(op, place_of(op.tile), accesses)


def _link(op: Link, fifos: Mapping[str, Fifo]) -> FifoLink:
    def known(names: Sequence[SymbolRefAttr]) -> tuple[Fifo, ...]:
        return tuple(fifos[flat(name)] for name in names if flat(name) in fifos)

    return FifoLink(op, known(op.inputs.data), known(op.outputs.data))


def _channels(program: Program) -> Iterator[Channel]:
    place = place_of(program.tile)
    for op in program.body.walk():
        if isinstance(op, DmaStart):
            blocks = tuple(_chain(op))
        elif isinstance(op, Dma):
            blocks = tuple(tuple(region.block.ops) for region in op.bds)
        else:
            continue
        repeat = integer(op.repeat_count) or 0
        index = op.channel_index.value.data
        yield Channel(op, place, op.channel_dir.data, index, repeat, blocks)


def _chain(start: DmaStart) -> Iterator[tuple[Operation, ...]]:
    """The blocks of a chain, each once, from the start along `next_bd`."""
    block, seen = start.dest, set()
    while block not in seen:
        seen.add(block)
        ops = tuple(block.ops)
        if not any(isinstance(op, DmaBd) for op in ops):
            return
        yield ops
        last = ops[-1]
        if not isinstance(last, NextBd):
            return
        block = last.dest
