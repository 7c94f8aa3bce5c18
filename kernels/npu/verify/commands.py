"""Rules for single commands of runtime sequences: tasks, registers, parameters."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from uq.kernels.npu.dialect.dma import DmaBd
from uq.kernels.npu.dialect.sequence import (
    AddressPatch,
    BlockWrite,
    MaskWrite32,
    PushQueue,
    RtpWrite,
    Sync,
    Write32,
)
from uq.kernels.npu.dialect.structure import Buffer
from uq.kernels.npu.dialect.tasks import (
    AwaitTask,
    ConfigureTask,
    ConfigureTaskFor,
    FreeTask,
    StartTask,
)
from uq.kernels.npu.dialect.text import flat, integer
from uq.kernels.npu.model import Design, nbytes, place_of
from uq.kernels.npu.pattern import owner
from uq.kernels.npu.target import MAX_REPEAT, WORD, Place
from uq.kernels.npu.verify.rule import (
    AIEX_VERIFIER,
    REGISTERS,
    SILENT,
    Problem,
    rule,
    rules_in,
)

RAW = (Write32, MaskWrite32, BlockWrite)


@rule("task.operand", "Start, await and free name a configured task.", AIEX_VERIFIER)
def task_operand(design: Design) -> Iterator[Problem]:
    for op in design.in_sequences():
        if not isinstance(op, StartTask | AwaitTask | FreeTask):
            continue
        if not isinstance(op.task.owner, ConfigureTask | ConfigureTaskFor):
            yield Problem(op, f"{op.name}: its operand is not a configured task")


@rule("task.channel", "A task runs on a channel that its tile has.", AIEX_VERIFIER)
def task_channel(design: Design) -> Iterator[Problem]:
    for task in design.ops(ConfigureTask):
        limits = design.target.limits(place := place_of(task.tile))
        number = task.channel.value.data
        if limits and not 0 <= number < limits.channels:
            text = f"{task.direction.data} {number}: tile {place}"
            yield Problem(task, f"{text} has channels 0 to {limits.channels - 1}")


@rule("task.started", "A configured task is started.", SILENT, severity="warning")
def task_started(design: Design) -> Iterator[Problem]:
    started = {op.task.owner for op in design.ops(StartTask)}
    for op in design.in_sequences():
        if isinstance(op, ConfigureTask | ConfigureTaskFor) and op not in started:
            yield Problem(op, "the task is configured and never started")


@rule("task.freed", "A task is not started again after it is freed.", AIEX_VERIFIER)
def task_freed(design: Design) -> Iterator[Problem]:
    freed = set()
    for op in design.in_sequences():
        if isinstance(op, FreeTask):
            freed.add(op.task)
        elif isinstance(op, StartTask) and op.task in freed:
            yield Problem(op, "the task was freed before")


@rule("task.pool", "Tasks that are not freed share the descriptors of their tile.", AIEX_VERIFIER)
def task_pool(design: Design) -> Iterator[Problem]:
    taken: defaultdict[Place, int] = defaultdict(int)
    for op in design.in_sequences():
        task = op.task.owner if isinstance(op, FreeTask) else op
        if not isinstance(task, ConfigureTask | ConfigureTaskFor):
            continue
        place = owner(design, next((bd for bd in task.walk() if isinstance(bd, DmaBd)), task))
        count = sum(isinstance(bd, DmaBd) for bd in task.walk())
        if place is None or (limits := design.target.limits(place)) is None:
            continue
        taken[place] += -count if isinstance(op, FreeTask) else count
        if taken[place] > limits.descriptors and not isinstance(op, FreeTask):
            text = f"{taken[place]} descriptors of tile {place}; it has {limits.descriptors}"
            yield Problem(op, f"{text}; free tasks that are done")


@rule("rtp.buffer", "A runtime parameter is a word of a named buffer.", AIEX_VERIFIER)
def rtp_buffer(design: Design) -> Iterator[Problem]:
    sizes = {_name(buffer): nbytes(buffer.buffer.type) for buffer in design.buffers}
    for op in design.ops(RtpWrite):
        name, index = flat(op.buffer), op.index.value.data
        if name not in sizes:
            yield Problem(op, f"@{name} is not a buffer of this device")
        elif not 0 <= index * WORD < sizes[name]:
            yield Problem(op, f"word {index} of @{name}, which has {sizes[name] // WORD}")


@rule(
    "register.address",
    "A register write is on a 4-byte address of a tile of the array.",
    AIEX_VERIFIER,
)
def register_address(design: Design) -> Iterator[Problem]:
    for op in design.in_sequences():
        if not isinstance(op, RAW):
            continue
        column, row = integer(op.column), integer(op.row)
        if op.buffer is None and op.address.value.data % WORD:
            yield Problem(op, f"address {op.address.value.data:#x} is not a multiple of 4")
        if column is not None and row is not None and design.kind(Place(column, row)) is None:
            yield Problem(op, f"tile {Place(column, row)} is not in the array")


@rule("register.value", "A value of a register write has 32 bits.", REGISTERS)
def register_value(design: Design) -> Iterator[Problem]:
    for op in design.in_sequences():
        if isinstance(op, Write32 | MaskWrite32):
            value = op.value.value.data
            if not -(2**31) <= value < 2**32:
                yield Problem(op, f"value {value} does not fit 32 bits")


@rule(
    "patch.argument",
    "An address patch names an argument of the sequence.",
    SILENT,
    severity="warning",
)
def patch_argument(design: Design) -> Iterator[Problem]:
    for sequence in design.sequences:
        count = len(sequence.body.block.args)
        for op in sequence.walk():
            if isinstance(op, AddressPatch) and not 0 <= op.arg_idx.value.data < count:
                text = f"argument {op.arg_idx.value.data}: the sequence has {count}"
                yield Problem(op, f"{text}; the host must give it too")


@rule(
    "sync.channel", "A sync names a direction, and channels of tiles of the array.", AIEX_VERIFIER
)
def sync_channel(design: Design) -> Iterator[Problem]:
    for op in design.ops(Sync):
        place = Place(op.column.value.data, op.row.value.data)
        limits, channel = design.target.limits(place), op.channel.value.data
        if op.direction.value.data not in (0, 1):
            yield Problem(op, f"direction {op.direction.value.data}: 0 is S2MM, 1 is MM2S")
        elif limits is None:
            yield Problem(op, f"tile {place} is not in the array")
        elif not 0 <= channel < limits.channels:
            yield Problem(op, f"channel {channel}: the tile has 0 to {limits.channels - 1}")


@rule("queue.push", "A push names a channel of the array and repeats at most 255 times.", REGISTERS)
def queue_push(design: Design) -> Iterator[Problem]:
    for op in design.ops(PushQueue):
        place = Place(op.column.value.data, op.row.value.data)
        limits, repeat = design.target.limits(place), op.repeat_count.value.data
        if limits is None or not 0 <= op.channel.value.data < limits.channels:
            yield Problem(op, f"tile {place} has no channel {op.channel.value.data}")
        elif not 0 <= repeat <= MAX_REPEAT:
            yield Problem(op, f"repeat_count {repeat}: it has 8 bits")


def _name(buffer: Buffer) -> str:
    return buffer.sym_name.data if buffer.sym_name else ""


RULES = rules_in(globals().values())
