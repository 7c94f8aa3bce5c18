"""Fields of buffer descriptors from transfers: sizes and strides as the registers hold them."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from xdsl.dialects.builtin import MemRefType
from xdsl.dialects.memref import CastOp, ReinterpretCastOp, SubviewOp
from xdsl.ir import BlockArgument, SSAValue

from uq.errors import DesignError
from uq.kernels.npu.dialect.attributes import Action, Dimension, PacketInfoAttr
from uq.kernels.npu.dialect.dma import DmaBd
from uq.kernels.npu.dialect.sequence import MemcpyNd
from uq.kernels.npu.dialect.structure import Lock, UseLock
from uq.kernels.npu.dialect.text import integer, memref_type
from uq.kernels.npu.model import element_bits, elements, place_of
from uq.kernels.npu.pattern import list_values
from uq.kernels.npu.target import LIMITS, Kind, Place

WORD_BITS = 32
NAMES = ("d0", "d1", "d2")
Fields = dict[str, int]


def memcpy_fields(op: MemcpyNd) -> tuple[Fields, int, int]:
    """The descriptor of a transfer, its offset in bytes and how often it is repeated."""
    lists = list_values(op)
    if lists is None:
        raise DesignError(f"{op.name}: offsets, sizes and strides must be constants, four each")
    offsets, sizes, strides = lists
    bits = element_bits(memref_type(op.memref))
    offset = sum(start * stride for start, stride in zip(offsets, strides, strict=True))
    layout = [Dimension(*pair) for pair in zip(sizes, strides, strict=True)]
    linear = sizes[1:3] == [1, 1] and strides[1:] == [0, 0, 1]
    fields = _walk(layout, bits, linear)
    fields["buffer_length"] = _words(prod(sizes[1:]), bits)
    return {**fields, **packet_fields(op.packet)}, offset * bits // 8, max(sizes[0] - 1, 0)


def bd_fields(op: DmaBd) -> tuple[Fields, int]:
    """The descriptor of a task, without its chain, and its offset in bytes."""
    kind = memref_type(op.buffer)
    bits, length = element_bits(kind), integer(op.len)
    length = elements(kind) if length is None else length
    fields = {"buffer_length": _words(length, bits), **packet_fields(op.packet)}
    layout = list(op.dimensions.data) if op.dimensions else []
    if layout:
        layout = [Dimension(1, 0)] * (4 - len(layout)) + layout
        if (walked := prod(size for size, _ in layout[1:])) != length:
            raise DesignError(f"{op.name}: its layout walks {walked} elements, its length {length}")
        fields |= _walk(layout, bits, linear=layout[1].size == layout[2].size == 1)
    if op.pad_dimensions:
        fields |= _pads(op)
    return fields, (integer(op.offset) or 0) * bits // 8


def packet_fields(packet: PacketInfoAttr | None) -> Fields:
    if packet is None:
        return {}
    return {"enable_packet": 1, "packet_type": packet.data.type, "packet_id": packet.data.id}


def lock_fields(uses: Sequence[UseLock], kind: Kind, place: Place) -> Fields:
    """One acquire and one release, or none; waits for "at least" are written as negative values."""
    fields: Fields = {}
    for use in uses:
        lock = use.lock.owner
        number = integer(lock.lock_id) if isinstance(lock, Lock) else None
        if not isinstance(lock, Lock) or number is None:
            raise DesignError(f"{use.name}: the lock of a task needs a number")
        number += _lock_base(kind, place, place_of(lock.tile))
        value = integer(use.value)
        value = 1 if value is None else value
        if use.action.data is Action.Release:
            fields |= {"lock_rel_id": number, "lock_rel_val": value & 0x7F}
        else:
            least = use.action.data is Action.AcquireGreaterEqual
            fields |= {"lock_acq_enable": 1, "lock_acq_id": number}
            fields["lock_acq_val"] = (-value if least else value) & 0x7F
    return fields


def _lock_base(kind: Kind, place: Place, owner: Place | None) -> int:
    """A mem tile numbers the locks of its western neighbour first, then its own, then others."""
    if kind is not Kind.MEM or owner is None:
        return 0
    return (owner.column - place.column + 1) * LIMITS[Kind.MEM].locks


def argument_of(value: SSAValue) -> tuple[BlockArgument | None, int]:
    """The argument of the sequence behind views of it, and where the view begins in bytes."""
    offset = 0
    while not isinstance(value, BlockArgument):
        op = value.owner
        if isinstance(op, SubviewOp):
            offset += _subview_offset(op)
        elif not isinstance(op, ReinterpretCastOp | CastOp):
            return None, 0
        value = op.source
    return value, offset


def _subview_offset(op: SubviewOp) -> int:
    """Of a view of one dimension whose elements lie side by side."""
    starts, strides = op.static_offsets.get_values(), op.static_strides.get_values()
    if op.offsets or op.strides or op.sizes or len(starts) != 1 or tuple(strides) != (1,):
        raise DesignError(f"{op.name}: only constant views of one dimension are lowered")
    kind = op.source.type
    bits = element_bits(kind) if isinstance(kind, MemRefType) else 0
    return int(starts[0]) * bits // 8


def _walk(layout: Sequence[Dimension], bits: int, linear: bool) -> Fields:
    """Registers of a layout of four dimensions, slowest first. The slowest repeats the others."""
    (count, step), *inner = layout
    fields: Fields = {}
    if count > 1 and step > 0:
        fields = {"iteration_size": count - 1, "iteration_stride": _step(step, bits)}
    if linear:
        return fields
    fastest = inner[-1]
    contiguous = fastest.stride * bits < WORD_BITS
    fields["d0_size"] = _words(fastest.size, bits)
    fields["d0_stride"] = 0 if contiguous else _step(fastest.stride, bits)
    for name, dimension in zip(NAMES[1:], reversed(inner[:-1]), strict=True):
        fields[f"{name}_size"] = dimension.size  # d2 has none: it goes on to the end
        fields[f"{name}_stride"] = _step(dimension.stride, bits) if dimension.size > 1 else 0
    return fields


def _pads(op: DmaBd) -> Fields:
    """Zeros around each dimension, fastest last in the text and first in the registers."""
    data = op.pad_dimensions.data if op.pad_dimensions else ()
    fields: Fields = {}
    for name, pad in zip(NAMES, reversed(data), strict=False):
        fields |= {f"{name}_zero_before": pad.before, f"{name}_zero_after": pad.after}
    return fields


def _words(count: int, bits: int) -> int:
    if count * bits % WORD_BITS:
        raise DesignError(f"{count} elements of {bits} bits are no whole number of 4-byte words")
    return count * bits // WORD_BITS


def _step(stride: int, bits: int) -> int:
    """Strides are stored in words, minus one."""
    return _words(stride, bits) - 1
