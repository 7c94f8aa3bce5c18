"""The runtime sequence: what the command processor does, one command after the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from xdsl.dialects import scf
from xdsl.ir import Block, Operation, SSAValue

from uq.errors import DesignError
from uq.kernels.npu.dialect.attributes import Dimension, Direction
from uq.kernels.npu.dialect.dma import DmaBd
from uq.kernels.npu.dialect.sequence import DYNAMIC, DmaWait, MemcpyNd, Preempt, RtpWrite, SetLock
from uq.kernels.npu.dialect.sequence import Sync as SyncOp
from uq.kernels.npu.dialect.structure import SequenceOperation
from uq.kernels.npu.dialect.tasks import (
    AwaitTask,
    ConfigureTask,
    ConfigureTaskFor,
    FreeTask,
    StartTask,
)
from uq.kernels.npu.dialect.text import flat, integer, memref_type
from uq.kernels.npu.emulator.arithmetic import FUNCTIONS
from uq.kernels.npu.emulator.array import Array
from uq.kernels.npu.emulator.lowlevel import blocks_of, descriptor
from uq.kernels.npu.emulator.memory import width_of
from uq.kernels.npu.emulator.scheduler import Steps
from uq.kernels.npu.emulator.streams import Bytes, Descriptor, TaskQueue, Walk
from uq.kernels.npu.model import place_of
from uq.kernels.npu.target import Place
from uq.kernels.npu.tasks import DIRECTIONS, Line, line_of

IGNORED = (ConfigureTask, ConfigureTaskFor, FreeTask, Preempt, scf.YieldOp)


def run_sequence(array: Array, program: SequenceOperation, arguments: Sequence[Bytes]) -> Steps:
    hosts: dict[SSAValue, Bytes] = {}
    hosts.update(zip(program.body.block.args, arguments, strict=True))
    yield from _Commands(array, hosts).block(program.body.block)


class _Commands:
    def __init__(self, array: Array, hosts: Mapping[SSAValue, Bytes]) -> None:
        self.array = array
        self.hosts = hosts
        self.values: dict[SSAValue, Any] = {}

    def block(self, block: Block) -> Steps:
        for op in block.ops:
            yield from self.command(op)

    def command(self, op: Operation) -> Steps:
        match op:
            case MemcpyNd():
                self.copy(op)
            case DmaWait():
                yield from self.wait(self.queue(flat(op.symbol)))
            case SyncOp():
                yield from self.wait(self.queue(_synced(op)))
            case StartTask():
                self.start(op)
            case AwaitTask():
                yield from self.wait(self.task_queue(op.task.owner))
            case RtpWrite():
                self.write(op)
            case SetLock():
                lock = self.array.locks[op.lock]
                lock.value = op.value.value.data
                lock.wake()
            case scf.ForOp():
                for index in range(*(self.values[v] for v in (op.lb, op.ub, op.step))):
                    self.values[op.body.block.args[0]] = index
                    yield from self.block(op.body.block)
            case _ if isinstance(op, IGNORED):
                pass
            case _ if type(op) in FUNCTIONS:
                FUNCTIONS[type(op)](op)(self.values)
            case _:
                raise DesignError(f"{op.name} in a runtime sequence is not emulated")

    def copy(self, op: MemcpyNd) -> None:
        queue = self.queue(flat(op.metadata))
        lists, dynamic = [], iter(op.dynamic)
        for given in (op.static_offsets, op.static_sizes, op.static_strides):
            lists.append(
                [
                    self.values[next(dynamic)] if value == DYNAMIC else int(value)
                    for value in given.get_values()
                ]
            )
        offsets, sizes, strides = lists
        offset = sum(a * b for a, b in zip(offsets, strides, strict=True))
        layout = [Dimension(*pair) for pair in zip(sizes, strides, strict=True)]
        walk = Walk(self.hosts[op.memref], width_of(memref_type(op.memref)), offset, layout)
        fills = self.line(flat(op.metadata)).direction is Direction.S2MM
        queue.push([Descriptor(walk)], fills or bool(integer(op.issue_token)))

    def start(self, op: StartTask) -> None:
        task = op.task.owner
        if not isinstance(task, ConfigureTask | ConfigureTaskFor):
            raise DesignError("a task that is started was not configured")
        blocks = list(blocks_of(task))
        chain = [descriptor(self.array, ops, self.host(ops)) for ops in blocks]
        times = (integer(task.repeat_count) or 0) + 1
        self.task_queue(task).push(chain * times, bool(integer(task.issue_token)))

    def host(self, ops: Sequence[Operation]) -> Bytes | None:
        """The host's buffer of a descriptor; None for a buffer of a tile."""
        (bd,) = (op for op in ops if isinstance(op, DmaBd))
        return self.hosts.get(bd.buffer)

    def wait(self, queue: TaskQueue) -> Steps:
        tokens = queue.tokens
        while not tokens.count:
            yield tokens, 1
        tokens.count -= 1

    def write(self, op: RtpWrite) -> None:
        name = flat(op.buffer)
        if name not in self.array.named:
            raise DesignError(f"npu.rtp_write: there is no buffer @{name}")
        words = self.array.named[name].data.view("<i4")
        if not 0 <= op.index.value.data < words.size:
            raise DesignError(f"npu.rtp_write: @{name} has {words.size} words")
        words[op.index.value.data] = op.value.value.data

    def task_queue(self, task: Operation | Block) -> TaskQueue:
        if isinstance(task, ConfigureTaskFor):
            return self.queue(flat(task.alloc))
        if isinstance(task, ConfigureTask) and (place := place_of(task.tile)) is not None:
            return self.queue(Line(place, task.direction.data, index=task.channel.value.data))
        raise DesignError("a task that is awaited was not configured")

    def line(self, name: str) -> Line:
        line = line_of(self.array.design, name)
        if line is None:
            raise DesignError(f"@{name} is neither a FIFO nor an allocation at a shim tile")
        return line

    def queue(self, name: str | Line) -> TaskQueue:
        line = self.line(name) if isinstance(name, str) else name
        if line in self.array.queues:
            return self.array.queues[line]
        # FIFOs take the channels of a shim tile in the order of their text.
        fifos = [
            queue
            for other, queue in self.array.queues.items()
            if other.index is None
            and (other.place, other.direction) == (line.place, line.direction)
        ]
        if line.index is None or line.index >= len(fifos):
            raise DesignError(f"{line.direction} {line.index} of {line.place} has no stream")
        return fifos[line.index]


def _synced(op: SyncOp) -> Line:
    place = Place(op.column.value.data, op.row.value.data)
    return Line(place, DIRECTIONS[op.direction.value.data], index=op.channel.value.data)
