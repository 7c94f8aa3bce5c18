"""The instructions of each operation of a runtime sequence."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from xdsl.dialects.arith import ConstantOp
from xdsl.dialects.builtin import DenseIntOrFPElementsAttr, SymbolRefAttr
from xdsl.dialects.memref import CastOp, GetGlobalOp, ReinterpretCastOp, SubviewOp
from xdsl.ir import Operation

from uq.errors import DesignError
from uq.formats.xdna import txn
from uq.kernels.npu.dialect.attributes import Direction
from uq.kernels.npu.dialect.configure import LoadPdi, WriteBd
from uq.kernels.npu.dialect.memref import Global
from uq.kernels.npu.dialect.sequence import (
    AddressPatch,
    BlockWrite,
    DmaWait,
    MaskWrite32,
    MemcpyNd,
    Preempt,
    PushQueue,
    RtpWrite,
    SetLock,
    Sync,
    Write32,
)
from uq.kernels.npu.dialect.structure import End, Lock, SequenceOperation
from uq.kernels.npu.dialect.tasks import (
    AwaitTask,
    ConfigureTask,
    ConfigureTaskFor,
    FreeTask,
    StartTask,
)
from uq.kernels.npu.dialect.text import flat, integer
from uq.kernels.npu.lowering.channels import Channel, shim_channels
from uq.kernels.npu.lowering.descriptors import argument_of, memcpy_fields
from uq.kernels.npu.lowering.registers import absolute, lock_address
from uq.kernels.npu.lowering.tasks import Task, Tasks
from uq.kernels.npu.lowering.tiles import Tiles
from uq.kernels.npu.model import Design, place_of
from uq.kernels.npu.target import WORD, Place

WORDLESS = (End, ConstantOp, GetGlobalOp, SubviewOp, ReinterpretCastOp, CastOp)
DIRECTIONS = (Direction.S2MM, Direction.MM2S)  # as a sync numbers them
MASK = 0xFFFFFFFF
Instructions = Iterator[txn.Operation]


class Commands:
    """One sequence; operations are given to `of` in their order, since tasks take descriptors."""

    def __init__(
        self, design: Design, program: SequenceOperation, like: txn.Transaction | None
    ) -> None:
        self.design, self.program = design, program
        self.tiles = Tiles(design, like.operations if like else ())
        self.channels = shim_channels(design)
        self.tasks = Tasks(self.tiles)
        self.globals = {op.sym_name.data: op for op in design.ops(Global)}

    def of(self, op: Operation) -> list[txn.Operation]:
        """Raises DesignError: the operation has no words."""
        if isinstance(op, WORDLESS):
            return []
        if (lowering := LOWERINGS.get(type(op))) is None:
            raise DesignError(f"{op.name} in a runtime sequence is not lowered")
        return list(lowering(self, op))

    def memcpy(self, op: MemcpyNd) -> Instructions:
        channel, number = self.channel(op.metadata), op.id.value.data
        fields, offset, repeat = memcpy_fields(op)
        argument, start = argument_of(op.memref)
        if argument is None:
            raise DesignError(f"{op.name}: its buffer is no argument of the sequence")
        token = bool(integer(op.issue_token)) or channel.direction is Direction.S2MM
        burst = integer(op.burst_length) or 0
        yield self.tiles.descriptor(channel.place, number, {**fields, "valid_bd": 1}, burst)
        address = self.tiles.address_register(channel.place, number)
        yield txn.Patch(address, argument.index, offset + start)
        yield from self.tiles.push(channel, number, repeat, token)

    def wait(self, op: DmaWait) -> Instructions:
        yield synchronize(self.channel(op.symbol))

    def sync(self, op: Sync) -> Instructions:
        names = ("direction", "row", "column", "row_num", "column_num", "channel")
        yield txn.Sync(*(integer(op.properties[name]) or 0 for name in names))

    def write32(self, op: Write32) -> Instructions:
        yield txn.Write(self.address(op), op.value.value.data & MASK)

    def maskwrite32(self, op: MaskWrite32) -> Instructions:
        value, mask = op.value.value.data & MASK, op.mask.value.data & MASK
        yield txn.MaskWrite(self.address(op), value, mask)

    def blockwrite(self, op: BlockWrite) -> Instructions:
        column, row = integer(op.column), integer(op.row)
        tile = (column, row) if column is not None and row is not None and not op.buffer else (0, 0)
        yield txn.BlockWrite(self.address(op), self.data(op), *tile)

    def patch(self, op: AddressPatch) -> Instructions:
        numbers = op.addr, op.arg_idx, op.arg_plus
        yield txn.Patch(*(number.value.data for number in numbers))

    def push(self, op: PushQueue) -> Instructions:
        place = Place(op.column.value.data, op.row.value.data)
        channel = Channel(place, op.direction.data, op.channel.value.data)
        repeat, token = op.repeat_count.value.data, bool(integer(op.issue_token))
        yield from self.tiles.push(channel, op.bd_id.value.data, repeat, token)

    def rtp_write(self, op: RtpWrite) -> Instructions:
        address = self.buffer_address(op.buffer, op.index.value.data)
        yield txn.Write(address, op.value.value.data & MASK)

    def set_lock(self, op: SetLock) -> Instructions:
        lock = op.lock.owner
        number = integer(lock.lock_id) if isinstance(lock, Lock) else None
        place = place_of(lock.tile) if isinstance(lock, Lock) else None
        if number is None or place is None:
            raise DesignError(f"{op.name}: its lock has no number")
        address = lock_address(self.tiles.kind(place), place, number)
        yield txn.Write(address, op.value.value.data & MASK)

    def load_pdi(self, op: LoadPdi) -> Instructions:
        if op.device_ref is not None:
            text = f"@{flat(op.device_ref)} gets its number from aiecc; give id"
            raise DesignError(f"{op.name}: {text}")
        number, size, address = (integer(value) or 0 for value in (op.id, op.size, op.address))
        yield txn.LoadPdi(number, size, address & MASK, address >> 32)

    def preempt(self, op: Preempt) -> Instructions:
        yield txn.Preempt(op.level.value.data)

    def writebd(self, op: WriteBd) -> Instructions:
        place = Place(op.field("column"), op.field("row"))
        fields = {name: op.field(name) for name in op.properties}
        yield self.tiles.descriptor(place, fields["bd_id"], fields, op.field("burst_length"))

    def configure(self, op: ConfigureTask) -> Instructions:
        if (place := place_of(op.tile)) is None:
            raise DesignError(f"{op.name}: its operand is no tile")
        channel = Channel(place, op.direction.data, op.channel.value.data)
        yield from self.tasks.configure(op, channel)

    def configure_for(self, op: ConfigureTaskFor) -> Instructions:
        yield from self.tasks.configure(op, self.channel(op.alloc))

    def start(self, op: StartTask) -> Instructions:
        task = self.tasks.of(op.task)
        yield from self.tiles.push(task.channel, task.numbers[0], task.repeat, task.token)

    def await_task(self, op: AwaitTask) -> Instructions:
        task: Task = self.tasks.of(op.task)
        if not task.token:
            raise DesignError(f"{op.name}: the task sends no token; give it issue_token = true")
        self.tasks.free(task)
        yield synchronize(task.channel)

    def free(self, op: FreeTask) -> Instructions:
        self.tasks.free(self.tasks.of(op.task))
        yield from ()

    def channel(self, name: SymbolRefAttr) -> Channel:
        if (channel := self.channels.get(flat(name))) is None:
            raise DesignError(f"@{flat(name)} is not a FIFO or allocation at a shim tile")
        return channel

    def address(self, op: Write32 | MaskWrite32 | BlockWrite) -> int:
        """Of a word of a buffer, of a register of a tile, or of the array."""
        offset, column, row = op.address.value.data, integer(op.column), integer(op.row)
        if op.buffer is not None:
            return self.buffer_address(op.buffer, offset)
        if column is None or row is None:
            return offset
        return absolute(Place(column, row), offset)

    def buffer_address(self, name: SymbolRefAttr, word: int) -> int:
        for buffer in self.design.buffers:
            if buffer.sym_name is not None and buffer.sym_name.data == flat(name):
                return self.tiles.memory_address(buffer) + WORD * word
        raise DesignError(f"there is no buffer @{flat(name)}")

    def data(self, op: BlockWrite) -> tuple[int, ...]:
        given = op.data.owner
        found = self.globals.get(flat(given.name_)) if isinstance(given, GetGlobalOp) else None
        value = found.initial_value if found is not None else None
        if not isinstance(value, DenseIntOrFPElementsAttr):
            raise DesignError(f"{op.name}: its data are no constants of a memref.global")
        return tuple(int(word) & MASK for word in value.get_values())


def synchronize(channel: Channel) -> txn.Sync:
    column, row = channel.place
    direction = DIRECTIONS.index(channel.direction)
    return txn.Sync(direction, row, column, rows=1, columns=1, channel=channel.number)


LOWERINGS: Mapping[type[Operation], Callable[[Commands, Any], Instructions]] = {
    MemcpyNd: Commands.memcpy,
    DmaWait: Commands.wait,
    Sync: Commands.sync,
    Write32: Commands.write32,
    MaskWrite32: Commands.maskwrite32,
    BlockWrite: Commands.blockwrite,
    AddressPatch: Commands.patch,
    PushQueue: Commands.push,
    RtpWrite: Commands.rtp_write,
    SetLock: Commands.set_lock,
    LoadPdi: Commands.load_pdi,
    Preempt: Commands.preempt,
    WriteBd: Commands.writebd,
    ConfigureTask: Commands.configure,
    ConfigureTaskFor: Commands.configure_for,
    StartTask: Commands.start,
    AwaitTask: Commands.await_task,
    FreeTask: Commands.free,
}
