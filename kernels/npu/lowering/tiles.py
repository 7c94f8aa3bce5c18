"""Writes to the registers of one tile: descriptors, queues, addresses of buffers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from uq.errors import DesignError
from uq.formats.xdna.txn import BlockWrite, MaskWrite, Operation, Write
from uq.kernels.npu.dialect.structure import Buffer
from uq.kernels.npu.dialect.text import integer
from uq.kernels.npu.lowering.channels import Channel
from uq.kernels.npu.lowering.registers import (
    BASES,
    UPSIZE,
    absolute,
    burst_code,
    control_address,
    descriptor_address,
    descriptor_words,
    queue_word,
)
from uq.kernels.npu.model import Design, place_of
from uq.kernels.npu.target import LIMITS, MAX_REPEAT, WORD, Kind, Place

CONTROLLER = 0x1F00  # bits of a channel's control register: who gets its tokens


class Tiles:
    def __init__(self, design: Design, like: Sequence[Operation]) -> None:
        self.design = design
        self.controllers = {
            place_of(tile.result): tile.controller_id.data.id
            for tile in design.tiles
            if tile.controller_id is not None
        }
        writes = [op for op in like if isinstance(op, MaskWrite) and op.mask == CONTROLLER]
        self.compiled = {op.address: op for op in writes}

    def kind(self, place: Place) -> Kind:
        if (kind := self.design.kind(place)) is None:
            raise DesignError(f"tile {place} is not in the array")
        return kind

    def descriptor(
        self, place: Place, number: int, fields: Mapping[str, int], burst: int
    ) -> BlockWrite:
        kind = self.kind(place)
        if not 0 <= number < LIMITS[kind].descriptors:
            raise DesignError(f"descriptor {number}: a {kind} tile has {LIMITS[kind].descriptors}")
        more = {}
        if kind is Kind.SHIM:
            more = {"burst": burst_code(self.design.target.name, burst), "cache": UPSIZE}
        elif kind is Kind.CORE:
            more = {"buffer_words": fields.get("buffer_offset", 0) // WORD}
        words = descriptor_words(kind, {**fields, **more})
        return BlockWrite(descriptor_address(kind, place, number), words)

    def address_register(self, place: Place, number: int) -> int:
        """The word of a descriptor that holds where its buffer begins."""
        kind = self.kind(place)
        return descriptor_address(kind, place, number) + WORD * BASES[kind].address_word

    def push(self, channel: Channel, number: int, repeat: int, token: bool) -> Iterator[Operation]:
        """Put a descriptor into the queue of a channel."""
        kind = self.kind(channel.place)
        control = control_address(kind, channel.place, channel.direction, channel.number)
        if not 0 <= repeat <= MAX_REPEAT:
            raise DesignError(f"a task is repeated 0 to {MAX_REPEAT} times, not {repeat}")
        if token and control in self.compiled:
            yield self.compiled[control]
        elif token and channel.place in self.controllers:
            yield MaskWrite(control, self.controllers[channel.place] << 8, CONTROLLER)
        yield Write(control + WORD, queue_word(number, repeat, token))

    def point(self, place: Place, number: int, buffer: Buffer, offset: int) -> MaskWrite:
        """Write the address of a buffer of the array into a descriptor."""
        kind, owner = self.kind(place), place_of(buffer.tile)
        address = self._local(buffer) + offset
        if kind is Kind.CORE:
            return MaskWrite(self.address_register(place, number), address // WORD << 14, 0xFFFC000)
        if kind is not Kind.MEM or owner is None:
            raise DesignError("a shim tile reads and writes arguments of the sequence only")
        if self.design.target.name.startswith("npu2"):  # west, own, east memory one after another
            address += (owner.column - place.column + 1) * LIMITS[Kind.MEM].memory
        return MaskWrite(self.address_register(place, number), address // WORD, 0x7FFFF)

    def memory_address(self, buffer: Buffer) -> int:
        """Of a buffer, in the array."""
        if (place := place_of(buffer.tile)) is None:
            raise DesignError("aie.buffer: its operand is no tile")
        return absolute(place, self._local(buffer))

    def _local(self, buffer: Buffer) -> int:
        if (address := integer(buffer.address)) is None:
            name = f" @{buffer.sym_name.data}" if buffer.sym_name else ""
            raise DesignError(f"buffer{name} has no address; give it one, as mlir-aie would")
        return address
