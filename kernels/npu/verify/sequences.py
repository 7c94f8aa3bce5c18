"""Rules for runtime sequences: names, tokens, queues, descriptors, registers."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

from xdsl.ir import Operation

from uq.kernels.npu.dialect.attributes import Direction
from uq.kernels.npu.dialect.sequence import (
    BlockWrite,
    DmaWait,
    MaskWrite32,
    MemcpyNd,
    PushQueue,
    Sync,
    Write32,
)
from uq.kernels.npu.dialect.structure import SequenceOperation
from uq.kernels.npu.dialect.tasks import (
    ConfigureTaskFor,
)
from uq.kernels.npu.dialect.text import flat, integer, memref_type
from uq.kernels.npu.model import Design, element_bits, elements, nbytes
from uq.kernels.npu.pattern import list_values, transfer
from uq.kernels.npu.target import LIMITS, QUEUE_DEPTH, Kind
from uq.kernels.npu.tasks import Flight, Start, Wait, events, line_of, upstream
from uq.kernels.npu.verify.rule import (
    AIEX_VERIFIER,
    SILENT,
    Problem,
    rule,
    rules_in,
)

SHIM = LIMITS[Kind.SHIM]
RAW = (Write32, MaskWrite32, BlockWrite)


@rule(
    "sequence.symbol",
    "Transfers and waits name a FIFO or allocation at a shim tile.",
    AIEX_VERIFIER,
)
def sequence_symbol(design: Design) -> Iterator[Problem]:
    for op in design.in_sequences():
        match op:
            case MemcpyNd():
                name = flat(op.metadata)
            case DmaWait():
                name = flat(op.symbol)
            case ConfigureTaskFor():
                name = flat(op.alloc)
            case _:
                continue
        if line_of(design, name) is None:
            yield Problem(op, f"@{name} is not a FIFO or allocation at a shim tile")


@rule("sequence.lists", "A transfer has four offsets, sizes and strides.", AIEX_VERIFIER)
def sequence_lists(design: Design) -> Iterator[Problem]:
    for op in design.ops(MemcpyNd):
        counts = [
            len(x.get_values()) for x in (op.static_offsets, op.static_sizes, op.static_strides)
        ]
        if counts != [4, 4, 4]:
            yield Problem(op, f"{counts[0]} offsets, {counts[1]} sizes, {counts[2]} strides")


@rule("sequence.descriptor", "The descriptors of a shim tile are 0 to 15.", SILENT)
def sequence_descriptor(design: Design) -> Iterator[Problem]:
    for op in design.in_sequences():
        number = (
            op.id if isinstance(op, MemcpyNd) else op.bd_id if isinstance(op, PushQueue) else None
        )
        value = integer(number)
        if value is not None and not 0 <= value < SHIM.descriptors:
            yield Problem(op, f"descriptor {value}: a shim tile has 0 to {SHIM.descriptors - 1}")


@rule("sequence.token", "A wait is for a task that sends a token.", SILENT)
def sequence_token(design: Design) -> Iterator[Problem]:
    for event, flight in _flights(design):
        if not isinstance(event, Wait) or flight.awaited(event) is not None:
            continue
        if isinstance(event.op, Sync) and _writes_registers(event.op):
            continue  # the task may have been started by a plain write
        if isinstance(event.op, DmaWait) and event.line is None:
            continue
        yield Problem(event.op, f"{event.op.name}: no task is under way that sends this token")


@rule("sequence.early-wait", "An output is awaited after its inputs are started.", SILENT)
def sequence_early_wait(design: Design) -> Iterator[Problem]:
    for sequence in design.sequences:
        order = list(events(design, sequence))
        for index, event in enumerate(order):
            line = event.line
            if not isinstance(event, Wait) or line is None or line.direction is not Direction.S2MM:
                continue
            before = {e.fifo for e in order[:index] if isinstance(e, Start)}
            after = {e.fifo for e in order[index:] if isinstance(e, Start)}
            late = (upstream(design, line.name) & after) - before - {line.name}
            for name in sorted(late):
                yield Problem(
                    event.op, f"waits for @{line.name} before its input @{name} is started"
                )


@rule("sequence.queue", f"A channel's queue holds {QUEUE_DEPTH} tasks.", SILENT)
def sequence_queue(design: Design) -> Iterator[Problem]:
    full = set()
    for event, flight in _flights(design):
        if not isinstance(event, Start) or event.line in full:
            continue
        if len(flight.running[event.line]) >= QUEUE_DEPTH:
            full.add(event.line)
            text = f"task {QUEUE_DEPTH + 1} on {event.line.direction} of {event.line.place}"
            yield Problem(event.op, f"{text} without a wait; its queue holds {QUEUE_DEPTH}")


@rule(
    "sequence.reuse",
    "A descriptor is written again after the task that uses it is awaited.",
    SILENT,
    severity="warning",
)
def sequence_reuse(design: Design) -> Iterator[Problem]:
    for event, flight in _flights(design):
        if isinstance(event, Start):
            used = {n for s in flight if s.line.place == event.line.place for n in s.descriptors}
            for number in sorted(used.intersection(event.descriptors)):
                text = f"descriptor {number} of {event.line.place}"
                yield Problem(event.op, f"{text} may still be in use by an earlier task")


@rule(
    "sequence.unawaited",
    "What the host reads is awaited.",
    SILENT,
    severity="warning",
)
def sequence_unawaited(design: Design) -> Iterator[Problem]:
    for sequence in design.sequences:
        if any(isinstance(op, RAW) for op in sequence.walk()):
            continue
        flight = Flight(design)
        for event in events(design, sequence):
            _advance(flight, event)
        for start in flight:
            if (
                start.line.direction is Direction.S2MM
                and design.kind(start.line.place) is Kind.SHIM
            ):
                yield Problem(start.op, "this output is not awaited before the sequence ends")


@rule(
    "sequence.element-type",
    "A transfer has the element type of its FIFO; only bytes count on the array.",
    SILENT,
    severity="warning",
)
def sequence_element_type(design: Design) -> Iterator[Problem]:
    for op in design.ops(MemcpyNd):
        fifo = design.fifos.get(flat(op.metadata))
        given = memref_type(op.memref).element_type
        if fifo and (held := fifo.element.element_type) != given:
            yield Problem(op, f"{given} data for @{fifo.name}, which holds {held}")


@rule(
    "sequence.objects",
    "A transfer carries whole objects of its FIFO.",
    SILENT,
    severity="warning",
)
def sequence_objects(design: Design) -> Iterator[Problem]:
    for op in design.ops(MemcpyNd):
        fifo, lists = design.fifos.get(flat(op.metadata)), list_values(op)
        if fifo is None or lists is None or not (size := nbytes(fifo.element)):
            continue
        total = prod(lists[1]) * element_bits(memref_type(op.memref)) // 8
        if total % size:
            yield Problem(op, f"{total} bytes for @{fifo.name}, whose objects have {size}")


@rule(
    "sequence.bounds",
    "A transfer stays inside the buffer that the sequence declares.",
    SILENT,
    severity="warning",
)
def sequence_bounds(design: Design) -> Iterator[Problem]:
    for op in design.ops(MemcpyNd):
        pattern, count = transfer(design, op), elements(memref_type(op.memref))
        if pattern is not None and count and pattern.last >= count:
            text = f"touches element {pattern.last} of {count}"
            yield Problem(op, f"{text}; the host must give a larger buffer")


def _flights(design: Design) -> Iterator[tuple[Start | Wait, Flight]]:
    """Every event with what is under way just before it."""
    for sequence in design.sequences:
        flight = Flight(design)
        for event in events(design, sequence):
            yield event, flight
            _advance(flight, event)


def _advance(flight: Flight, event: Start | Wait) -> None:
    if isinstance(event, Start):
        flight.start(event)
    elif (task := flight.awaited(event)) is not None:
        flight.retire(task)


def _writes_registers(op: Operation) -> bool:
    sequence = op.parent_op()
    while sequence is not None and not isinstance(sequence, SequenceOperation):
        sequence = sequence.parent_op()
    return sequence is not None and any(isinstance(other, RAW) for other in sequence.walk())


RULES = rules_in(globals().values())
