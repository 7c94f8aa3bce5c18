"""A design as running parts: buffers, locks, streams, DMA channels and cores."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from xdsl.ir import SSAValue

from uq.errors import DesignError
from uq.kernels.npu.dialect.attributes import Direction
from uq.kernels.npu.dialect.attributes import Port as FifoPort
from uq.kernels.npu.dialect.streams import CascadeFlow, PacketFlow
from uq.kernels.npu.emulator.memory import Memory, memory
from uq.kernels.npu.emulator.scheduler import Lock, Process, Scheduler
from uq.kernels.npu.emulator.streams import Descriptor, Port, TaskQueue
from uq.kernels.npu.model import Design, place_of
from uq.kernels.npu.target import Place
from uq.kernels.npu.tasks import Line

REFUSED = (PacketFlow, CascadeFlow)


@dataclass(frozen=True, eq=False)
class Ring:
    """The objects of a FIFO in one tile; one lock counts the free ones, one the full ones."""

    objects: Sequence[Memory]
    free: Lock
    full: Lock

    def turn(self, filling: bool) -> tuple[tuple[Lock, int], tuple[Lock, int]]:
        """What to acquire and what to release to fill one object, or to empty it."""
        free, full = (self.free, 1), (self.full, 1)
        return (free, full) if filling else (full, free)


class Array:
    """Everything of a design but its sequence.

    Attributes:
        buffers: by the value of their `aie.buffer`; `named` by their symbol.
        queues: the channels that the sequence controls.
        rings: of a FIFO's end, by the name of the FIFO, the end and its tile.
    """

    def __init__(self, design: Design) -> None:
        for op in design.device.walk():
            if isinstance(op, REFUSED):
                raise DesignError(f"{op.name} is not emulated")
        self.design = design
        self.scheduler = Scheduler()
        self.buffers: dict[SSAValue, Memory] = {}
        self.named: dict[str, Memory] = {}
        for op in design.buffers:
            buffer = self.buffers[op.buffer] = memory(op.buffer.type, op.initial_value)
            if op.sym_name is not None:
                self.named[op.sym_name.data] = buffer
        self.locks: dict[SSAValue, Lock] = {}
        for lock in design.locks:
            name = lock.sym_name.data if lock.sym_name else f"%{lock.result.name_hint or 'lock'}"
            value = lock.init.value.data if lock.init is not None else 0
            label = f"lock {name} of {place_of(lock.tile)}"
            self.locks[lock.result] = Lock(self.scheduler, label, value=value)
        self.queues: dict[Line, TaskQueue] = {}
        self.rings: dict[tuple[str, FifoPort, Place | None], Ring] = {}

    def ring(self, name: str, objects: Sequence[Memory], depth: int) -> Ring:
        """A ring of free objects."""
        free = Lock(self.scheduler, f"free objects of {name}", value=depth)
        return Ring(objects, free, Lock(self.scheduler, f"full objects of {name}"))

    def add_queue(self, line: Line, name: str, port: Port) -> None:
        """A channel that waits for tasks of the sequence."""
        queue = self.queues[line] = TaskQueue(self.scheduler, f"{name} ({line.direction})")
        process = self.scheduler.start(f"the channel of {queue.name}", queue.work(port))
        port.stream.suppliers.append(process)
        queue.tokens.suppliers.append(process)

    def add_channel(
        self, name: str, port: Port, descriptors: Iterable[Descriptor], locks: Iterable[Lock]
    ) -> None:
        """A channel that runs by itself; `locks` are those that it releases."""
        direction = Direction.MM2S if port.sink is None else Direction.S2MM
        label = f"the DMA of {name} ({direction})"
        process = self.scheduler.start(label, port.pass_all(descriptors))
        port.stream.suppliers.append(process)
        supplies(process, locks)


def supplies(process: Process, locks: Iterable[Lock]) -> None:
    for lock in dict.fromkeys(locks):
        lock.suppliers.append(process)
