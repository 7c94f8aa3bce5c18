"""What a runtime sequence starts and awaits, in order, and what is under way at each point."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from xdsl.ir import Operation, SSAValue

from uq.kernels.npu.dialect.attributes import Direction
from uq.kernels.npu.dialect.dma import DmaBd
from uq.kernels.npu.dialect.sequence import DmaWait, MemcpyNd, PushQueue, Sync
from uq.kernels.npu.dialect.structure import SequenceOperation
from uq.kernels.npu.dialect.tasks import AwaitTask, ConfigureTask, ConfigureTaskFor, StartTask
from uq.kernels.npu.dialect.text import flat, integer
from uq.kernels.npu.model import Design, place_of
from uq.kernels.npu.resources import shim_of
from uq.kernels.npu.target import Kind, Place

DIRECTIONS = (Direction.S2MM, Direction.MM2S)  # as aiex.npu.sync numbers them


@dataclass(frozen=True)
class Line:
    """A DMA channel as the sequence names it: by a FIFO (`name`) or by its number."""

    place: Place
    direction: Direction
    name: str = ""
    index: int | None = None


@dataclass(frozen=True)
class Start:
    """`fifo` is the name behind it, empty for a channel that is given by number."""

    op: Operation
    line: Line
    fifo: str
    descriptors: tuple[int, ...]
    token: bool
    task: SSAValue | None = None


@dataclass(frozen=True)
class Wait:
    """On one task, on the channel behind a name, or on a channel by number."""

    op: Operation
    line: Line | None
    task: SSAValue | None = None


def events(design: Design, sequence: SequenceOperation) -> Iterator[Start | Wait]:
    """In the order of the text. What names nothing known is left to other rules."""
    for op in sequence.walk():
        event = _event(design, op)
        if event is not None:
            yield event


def _event(design: Design, op: Operation) -> Start | Wait | None:
    match op:
        case MemcpyNd():
            name, line = flat(op.metadata), line_of(design, flat(op.metadata))
            if line is None:
                return None
            # The channel that writes to the host always sends a token.
            token = bool(integer(op.issue_token)) or line.direction is Direction.S2MM
            return Start(op, line, name, (op.id.value.data,), token)
        case DmaWait():
            return Wait(op, line_of(design, flat(op.symbol)))
        case StartTask():
            return _start_task(design, op)
        case AwaitTask():
            return Wait(op, None, op.task)
        case PushQueue():
            place = Place(op.column.value.data, op.row.value.data)
            line = Line(place, op.direction.data, index=op.channel.value.data)
            token = bool(integer(op.issue_token))
            return Start(op, line, "", (op.bd_id.value.data,), token)
        case Sync():
            return _sync(op)
    return None


def _start_task(design: Design, op: StartTask) -> Start | None:
    task = op.task.owner
    if isinstance(task, ConfigureTaskFor):
        name, line = flat(task.alloc), line_of(design, flat(task.alloc))
    elif isinstance(task, ConfigureTask) and (place := place_of(task.tile)) is not None:
        name, line = "", Line(place, task.direction.data, index=task.channel.value.data)
    else:
        return None
    if line is None:
        return None
    ids = (integer(bd.bd_id) for bd in task.walk() if isinstance(bd, DmaBd))
    known = tuple(number for number in ids if number is not None)
    return Start(op, line, name, known, bool(integer(task.issue_token)), op.task)


def _sync(op: Sync) -> Wait | None:
    direction = op.direction.value.data
    if direction not in (0, 1):
        return None
    place = Place(op.column.value.data, op.row.value.data)
    return Wait(op, Line(place, DIRECTIONS[direction], index=op.channel.value.data))


def line_of(design: Design, name: str) -> Line | None:
    """The shim channel behind an allocation or a FIFO."""
    place = shim_of(design, name)
    if place is None or design.kind(place) is not Kind.SHIM:
        return None
    if (allocation := design.allocations.get(name)) is not None:
        index = allocation.channel_index.value.data
        return Line(place, allocation.channel_dir.data, index=index)
    produces = design.fifos[name].producer == place
    return Line(place, Direction.MM2S if produces else Direction.S2MM, name)


class Flight:
    """The tasks that may still run.

    A wait retires the oldest task of its channel that sends a token, and those before it. When
    nothing more comes out of an output, the inputs that were started for it are done as well.
    """

    def __init__(self, design: Design) -> None:
        self.design = design
        self.running: defaultdict[Line, list[Start]] = defaultdict(list)
        self.done: list[Start] = []  # taken to be done; their tokens were not awaited yet

    def start(self, start: Start) -> None:
        self.running[start.line].append(start)

    def awaited(self, wait: Wait) -> Start | None:
        """The task whose token this wait takes; None when none will come."""
        return next(
            (task for task in (*self, *self.done) if task.token and _meant(wait, task)), None
        )

    def retire(self, task: Start) -> None:
        if task in self.done:
            self.done.remove(task)
            return
        queue = self.running[task.line]
        del queue[: queue.index(task) + 1]
        if task.line.direction is Direction.S2MM and not queue:
            feeding = upstream(self.design, task.fifo)
            for line, tasks in self.running.items():
                if line.direction is Direction.MM2S:
                    self.done += [t for t in tasks if not feeding or t.fifo in feeding]
                    tasks[:] = [t for t in tasks if feeding and t.fifo not in feeding]

    def __iter__(self) -> Iterator[Start]:
        for queue in self.running.values():
            yield from queue


def _meant(wait: Wait, task: Start) -> bool:
    if wait.task is not None:
        return task.task is wait.task
    return wait.line is not None and _same(task.line, wait.line)


def _same(line: Line, other: Line) -> bool:
    if None in (line.index, other.index):
        return (line.place, line.direction) == (other.place, other.direction) and (
            not line.name or not other.name or line.name == other.name
        )
    return line == other


def upstream(design: Design, name: str) -> frozenset[str]:
    """FIFOs from which data can reach this one, through links and cores; empty if unknown."""
    if name not in design.fifos:
        return frozenset()
    reached, todo = {name}, [name]
    while todo:
        fifo = design.fifos[todo.pop()]
        for other in design.fifos.values():
            meets = other.name not in reached and fifo.producer in other.consumers
            if meets and _feeds(design, other.name, fifo.name):
                reached.add(other.name)
                todo.append(other.name)
    return frozenset(reached)


def _feeds(design: Design, source: str, dest: str) -> bool:
    """In a tile with a link only linked FIFOs feed each other; in a core all its inputs count."""
    links = [
        link
        for link in design.links
        if design.fifos[dest] in link.outputs and link.place is not None
    ]
    return not links or any(design.fifos[source] in link.inputs for link in links)
