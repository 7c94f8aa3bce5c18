"""Addresses of registers, and the words of a buffer descriptor.

Source: AIETargetModel.cpp and AIEDmaToNpu.cpp of mlir-aie (March 2026), AM025.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from uq.errors import DesignError
from uq.kernels.npu.dialect.attributes import Direction
from uq.kernels.npu.target import Kind, Place

TOKEN = 1 << 31  # of a task: send a token when it is done
DESCRIPTOR_BYTES, CHANNEL_BYTES, LOCK_BYTES = 0x20, 8, 0x10


class Base(NamedTuple):
    """Where the registers of one kind of tile begin."""

    descriptors: int
    into_memory: int  # control of the first S2MM channel; its task queue is one word on
    out_of_memory: int  # of the first MM2S channel
    locks: int
    address_word: int  # the word of a descriptor that holds its buffer's address


BASES: Mapping[Kind, Base] = {
    Kind.SHIM: Base(0x1D000, 0x1D200, 0x1D210, 0x14000, 1),
    Kind.MEM: Base(0xA0000, 0xA0600, 0xA0630, 0xC0000, 1),
    Kind.CORE: Base(0x1D000, 0x1DE00, 0x1DE10, 0x1F000, 0),
}


class Bits(NamedTuple):
    """A field in a word: its lowest bit and its width."""

    name: str
    shift: int
    width: int


Word = tuple[Bits, ...]
PACKET = (Bits("out_of_order_id", 24, 6), Bits("packet_id", 19, 5), Bits("packet_type", 16, 3))
CHAIN = (
    Bits("next_bd", 27, 4),
    Bits("use_next_bd", 26, 1),
    Bits("valid_bd", 25, 1),
    Bits("lock_rel_val", 18, 7),
    Bits("lock_rel_id", 13, 4),
    Bits("lock_acq_enable", 12, 1),
    Bits("lock_acq_val", 5, 7),
    Bits("lock_acq_id", 0, 4),
)
WORDS: Mapping[Kind, tuple[Word, ...]] = {
    Kind.SHIM: (
        (Bits("buffer_length", 0, 32),),
        (Bits("buffer_offset", 0, 32),),
        (Bits("enable_packet", 30, 1), *PACKET),
        (Bits("d0_size", 20, 10), Bits("d0_stride", 0, 20)),
        (Bits("burst", 30, 2), Bits("d1_size", 20, 10), Bits("d1_stride", 0, 20)),
        (Bits("cache", 24, 4), Bits("d2_stride", 0, 20)),
        (
            Bits("iteration_current", 26, 6),
            Bits("iteration_size", 20, 6),
            Bits("iteration_stride", 0, 20),
        ),
        CHAIN,
    ),
    Kind.MEM: (
        (
            Bits("enable_packet", 31, 1),
            Bits("packet_type", 28, 3),
            Bits("packet_id", 23, 5),
            Bits("out_of_order_id", 17, 6),
            Bits("buffer_length", 0, 17),
        ),
        (
            Bits("d0_zero_before", 26, 6),
            Bits("next_bd", 20, 6),
            Bits("use_next_bd", 19, 1),
            Bits("buffer_offset", 0, 19),
        ),
        (Bits("d0_size", 17, 10), Bits("d0_stride", 0, 17)),
        (Bits("d1_zero_before", 27, 5), Bits("d1_size", 17, 10), Bits("d1_stride", 0, 17)),
        (Bits("d2_zero_before", 27, 4), Bits("d2_stride", 0, 17)),
        (Bits("d2_zero_after", 28, 4), Bits("d1_zero_after", 23, 5), Bits("d0_zero_after", 17, 6)),
        (
            Bits("iteration_current", 23, 6),
            Bits("iteration_size", 17, 6),
            Bits("iteration_stride", 0, 17),
        ),
        (
            Bits("valid_bd", 31, 1),
            Bits("lock_rel_val", 24, 7),
            Bits("lock_rel_id", 16, 8),
            Bits("lock_acq_enable", 15, 1),
            Bits("lock_acq_val", 8, 7),
            Bits("lock_acq_id", 0, 8),
        ),
    ),
    Kind.CORE: (
        (Bits("buffer_words", 14, 14), Bits("buffer_length", 0, 14)),
        (Bits("enable_packet", 30, 1), *PACKET),
        (Bits("d1_stride", 13, 13), Bits("d0_stride", 0, 13)),
        (Bits("d1_size", 21, 8), Bits("d0_size", 13, 8), Bits("d2_stride", 0, 13)),
        (
            Bits("iteration_current", 19, 6),
            Bits("iteration_size", 13, 6),
            Bits("iteration_stride", 0, 13),
        ),
        CHAIN,
    ),
}
BURSTS = {64: 0, 128: 1, 256: 2, 512: 3}  # bytes; the last on npu2 only
UPSIZE = 2  # AXCache of a shim descriptor: the network may widen transfers


def absolute(place: Place, offset: int) -> int:
    return place.column << 25 | place.row << 20 | offset & 0xFFFFF


def descriptor_address(kind: Kind, place: Place, number: int) -> int:
    return absolute(place, BASES[kind].descriptors + DESCRIPTOR_BYTES * number)


def control_address(kind: Kind, place: Place, direction: Direction, channel: int) -> int:
    base = BASES[kind]
    first = base.into_memory if direction is Direction.S2MM else base.out_of_memory
    return absolute(place, first + CHANNEL_BYTES * channel)


def lock_address(kind: Kind, place: Place, number: int) -> int:
    return absolute(place, BASES[kind].locks + LOCK_BYTES * number)


def queue_word(descriptor: int, repeat: int, token: bool) -> int:
    """A task for a channel's queue: the low 4 bits of the descriptor, as mlir-aie writes it."""
    return descriptor & 0xF | (repeat & 0xFF) << 16 | (TOKEN if token else 0)


def burst_code(device: str, length: int) -> int:
    """The burst field of a shim descriptor; length 0 stands for the longest."""
    longest = 512 if device.startswith("npu2") else 256
    code = BURSTS.get(length or longest)
    if code is None or length > longest:
        raise DesignError(f"burst_length {length}: {device} has bursts of 64 to {longest} bytes")
    return code


def descriptor_words(kind: Kind, fields: Mapping[str, int]) -> tuple[int, ...]:
    """Raises DesignError: a field does not fit into its bits."""
    return tuple(_word(word, fields) for word in WORDS[kind])


def _word(word: Word, fields: Mapping[str, int]) -> int:
    value = 0
    for name, shift, width in word:
        field = fields.get(name, 0)
        if not 0 <= field < 1 << width:
            raise DesignError(f"descriptor field {name}: {field} does not fit into {width} bits")
        value |= field << shift
    return value
