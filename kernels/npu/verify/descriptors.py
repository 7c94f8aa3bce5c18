"""Rules for DMA programs and their buffer descriptors, FIFO layouts included."""

from __future__ import annotations

from collections.abc import Iterator

from xdsl.ir import Operation

from uq.kernels.npu.dialect.attributes import Action, Direction
from uq.kernels.npu.dialect.dma import Dma, DmaBd
from uq.kernels.npu.dialect.sequence import MemcpyNd
from uq.kernels.npu.dialect.structure import Buffer, Lock, UseLock
from uq.kernels.npu.dialect.text import integer
from uq.kernels.npu.model import Design, elements, place_of
from uq.kernels.npu.pattern import Pattern, owner, patterns
from uq.kernels.npu.target import LIMITS, MAX_ITERATIONS, MAX_REPEAT, WORD, Kind, Place
from uq.kernels.npu.verify.rule import (
    AIE_VERIFIER,
    AIEX_VERIFIER,
    REGISTERS,
    SILENT,
    TARGET_MODEL,
    Problem,
    rule,
    rules_in,
)

WORD_BITS = 8 * WORD
MEM_BANK = 24  # descriptors for even channels of a mem tile; the others serve the odd ones


@rule("dma.channel", "A DMA program uses channels that its tile has.", AIE_VERIFIER)
def dma_channel(design: Design) -> Iterator[Problem]:
    for channel in design.channels:
        limits = design.target.limits(channel.place)
        if limits and not 0 <= channel.index < limits.channels:
            text = f"{channel.direction} {channel.index}: tile {channel.place}"
            yield Problem(channel.op, f"{text} has channels 0 to {limits.channels - 1}")


@rule("dma.blocks", "A DMA program has at most 16 descriptors, of a mem tile 48.", AIE_VERIFIER)
def dma_blocks(design: Design) -> Iterator[Problem]:
    for program in design.programs:
        limits = design.target.limits(place_of(program.tile))
        count = sum(isinstance(op, DmaBd) for op in program.walk())
        if limits and count > limits.descriptors:
            text = f"{program.name}: {count} descriptors"
            yield Problem(program, f"{text}; the tile has {limits.descriptors}")


@rule("dma.repeat", f"A task repeats at most {MAX_REPEAT} times.", REGISTERS)
def dma_repeat(design: Design) -> Iterator[Problem]:
    for channel in design.channels:
        if not 0 <= channel.repeat <= MAX_REPEAT:
            yield Problem(channel.op, f"repeat_count {channel.repeat}: it has 8 bits")


@rule(
    "dma.bank", "Even channels of a mem tile use descriptors 0 to 23, odd ones 24 to 47.", REGISTERS
)
def dma_bank(design: Design) -> Iterator[Problem]:
    for channel in design.channels:
        if design.kind(channel.place) is not Kind.MEM:
            continue
        first = MEM_BANK * (channel.index % 2)
        for op in (op for block in channel.blocks for op in block if isinstance(op, DmaBd)):
            number = integer(op.bd_id)
            if number is not None and not first <= number < first + MEM_BANK:
                text = f"descriptor {number} on channel {channel.index}"
                yield Problem(op, f"{text}: it uses {first} to {first + MEM_BANK - 1}")


@rule("dma.descriptor-locks", "A descriptor acquires one lock and releases one at most.", REGISTERS)
def dma_descriptor_locks(design: Design) -> Iterator[Problem]:
    for channel in design.channels:
        for block in channel.blocks:
            uses = [op for op in block if isinstance(op, UseLock)]
            releases = sum(op.action.data is Action.Release for op in uses)
            for count, verb in ((len(uses) - releases, "acquires"), (releases, "releases")):
                if count > 1:
                    yield Problem(uses[0], f"the descriptor {verb} {count} locks")


@rule("dma.one-descriptor", "A block of a DMA program holds one descriptor.", AIE_VERIFIER)
def dma_one_descriptor(design: Design) -> Iterator[Problem]:
    for channel in design.channels:
        for block in channel.blocks:
            descriptors = [op for op in block if isinstance(op, DmaBd)]
            if len(descriptors) > 1 or (isinstance(channel.op, Dma) and not descriptors):
                yield Problem(channel.op, f"a block with {len(descriptors)} descriptors")


@rule("bd.id", "A descriptor id is 0 to 15, on a mem tile 0 to 47.", TARGET_MODEL)
def bd_id(design: Design) -> Iterator[Problem]:
    for op in design.ops(DmaBd):
        number, limits = integer(op.bd_id), design.target.limits(owner(design, op))
        if number is not None and limits and not 0 <= number < limits.descriptors:
            yield Problem(op, f"descriptor {number}: the tile has 0 to {limits.descriptors - 1}")


@rule("bd.buffer", "A DMA reads and writes memory that it reaches.", AIE_VERIFIER)
def bd_buffer(design: Design) -> Iterator[Problem]:
    for op in design.ops(DmaBd):
        place, buffer = owner(design, op), op.buffer.owner
        if place is None or not isinstance(buffer, Buffer):
            continue
        memory = place_of(buffer.tile)
        if not _dma_reaches(design, place, memory):
            yield Problem(op, f"the DMA of tile {place} does not reach a buffer of tile {memory}")


@rule("bd.lock", "A DMA uses locks that it reaches.", AIE_VERIFIER)
def bd_lock(design: Design) -> Iterator[Problem]:
    for program in design.programs:
        place = place_of(program.tile)
        for use in program.walk():
            if isinstance(use, UseLock) and isinstance(use.lock.owner, Lock):
                where = place_of(use.lock.owner.tile)
                if not _dma_reaches(design, place, where):
                    text = f"the DMA of tile {place} does not reach a lock of tile {where}"
                    yield Problem(use, text)


@rule("bd.dimensions", "A layout has 3 dimensions, on a mem tile 4.", AIE_VERIFIER)
def bd_dimensions(design: Design) -> Iterator[Problem]:
    for pattern in patterns(design):
        most = LIMITS[pattern.kind].dimensions
        if (count := len(pattern.dimensions)) > most:
            text = f"{count} dimensions; {_where(pattern)} has {most}"
            yield Problem(pattern.op, text)


@rule("bd.wrap", "The size of a dimension fits its wrap register.", AIEX_VERIFIER)
def bd_wrap(design: Design) -> Iterator[Problem]:
    for pattern in patterns(design):
        limits = LIMITS[pattern.kind]
        if pattern.linear or not pattern.bits:
            continue
        for index, dimension in enumerate(reversed(pattern.dimensions)):
            size = dimension.size * pattern.bits // WORD_BITS if index == 0 else dimension.size
            # The slowest dimension has no wrap register: it goes on to the end of the transfer.
            if index < limits.dimensions - 1 and size > limits.max_wrap:
                text = f"dimension {index}: {size} steps; {_where(pattern)} takes {limits.max_wrap}"
                yield Problem(pattern.op, text)


@rule("bd.size", "Sizes and lengths are at least 1, offsets and strides at least 0.", AIEX_VERIFIER)
def bd_size(design: Design) -> Iterator[Problem]:
    for pattern in patterns(design):
        walk = [*pattern.dimensions, *([pattern.iteration] if pattern.iteration else [])]
        if pattern.offset < 0 or pattern.length < 1 or any(s < 1 or t < 0 for s, t in walk):
            sizes = f"offset {pattern.offset}, length {pattern.length}"
            steps = ", ".join(f"{size} x stride {stride}" for size, stride in walk)
            yield Problem(pattern.op, f"{sizes}, {steps}".rstrip(", "))


@rule("bd.iteration", f"A transfer is repeated at most {MAX_ITERATIONS} times.", AIEX_VERIFIER)
def bd_iteration(design: Design) -> Iterator[Problem]:
    for pattern in patterns(design):
        if pattern.iteration and pattern.iteration.size > MAX_ITERATIONS:
            yield Problem(
                pattern.op, f"{pattern.iteration.size} repetitions; the register has 6 bits"
            )


@rule("bd.step", "A stride fits its step register.", AIEX_VERIFIER)
def bd_step(design: Design) -> Iterator[Problem]:
    for pattern in patterns(design):
        limits = LIMITS[pattern.kind]
        for stride in _strides(pattern):
            words = stride * pattern.bits // WORD_BITS
            if words > limits.max_step:
                text = f"stride of {words} words; {_where(pattern)} takes {limits.max_step}"
                yield Problem(pattern.op, text)


@rule(
    "bd.stride-bytes",
    "Strides are multiples of 4 bytes; narrow elements lie side by side.",
    AIEX_VERIFIER,
)
def bd_stride_bytes(design: Design) -> Iterator[Problem]:
    for pattern in patterns(design):
        if not pattern.bits or pattern.bits >= WORD_BITS:
            continue
        if pattern.dimensions and pattern.dimensions[-1].size > 1:
            stride = pattern.dimensions[-1].stride
            if stride != 1:
                text = f"innermost stride {stride} of {pattern.bits}-bit elements; it must be 1"
                yield Problem(pattern.op, text)
        for stride in _strides(pattern):
            if stride * pattern.bits % WORD_BITS and stride != 1:
                text = f"stride of {stride} elements of {pattern.bits} bits"
                yield Problem(pattern.op, f"{text} is not a multiple of 4 bytes")


@rule("bd.length-bytes", "Runs, lengths and offsets are multiples of 4 bytes.", AIEX_VERIFIER)
def bd_length_bytes(design: Design) -> Iterator[Problem]:
    for pattern in patterns(design):
        run = pattern.dimensions[-1].size if pattern.dimensions else pattern.length
        facts = [("offset", pattern.offset), ("length", pattern.length)]
        if not pattern.linear:
            facts.append(("contiguous run", run))
        for what, count in facts:
            if count * pattern.bits % WORD_BITS:
                text = f"{what} of {count} elements of {pattern.bits} bits"
                yield Problem(pattern.op, f"{text} is not a multiple of 4 bytes")
                break


@rule("bd.bounds", "A pattern stays inside its buffer.", AIE_VERIFIER)
def bd_bounds(design: Design) -> Iterator[Problem]:
    for pattern in patterns(design):
        count = 0 if isinstance(pattern.op, MemcpyNd) else elements(pattern.buffer)
        if count and pattern.last >= count and not pattern.pads:
            yield Problem(pattern.op, f"touches element {pattern.last}; the buffer has {count}")


@rule("bd.length", "A transfer fits the length register of its tile.", REGISTERS)
def bd_length(design: Design) -> Iterator[Problem]:
    for pattern in patterns(design):
        most, words = LIMITS[pattern.kind].max_length, pattern.length * pattern.bits // WORD_BITS
        if words > most:
            yield Problem(pattern.op, f"{words} words; {_where(pattern)} takes {most}")


@rule("bd.padding", "Only mem tiles pad, and only what they send.", AIE_VERIFIER)
def bd_padding(design: Design) -> Iterator[Problem]:
    receiving = {
        op
        for channel in design.channels
        for block in channel.blocks
        for op in block
        if channel.direction is Direction.S2MM
    }
    for pattern in patterns(design):
        if not pattern.pads:
            continue
        if pattern.kind is not Kind.MEM or pattern.op in receiving:
            yield Problem(pattern.op, f"padding on {_where(pattern)} or on a channel that receives")
        elif len(pattern.pads) != len(pattern.dimensions):
            text = f"{len(pattern.pads)} paddings for {len(pattern.dimensions)} dimensions"
            yield Problem(pattern.op, text)


@rule("bd.empty", "A DMA channel that is started has a descriptor.", SILENT)
def bd_empty(design: Design) -> Iterator[Problem]:
    for channel in design.channels:
        if not channel.blocks:
            yield Problem(channel.op, f"{channel.direction} {channel.index} has no descriptor")


def _dma_reaches(design: Design, place: Place | None, memory: Place | None) -> bool:
    """Its own tile; from a mem tile those beside it too. Unknown tiles have rules of their own."""
    if place is None or memory is None or place == memory:
        return True
    return design.kind(place) is Kind.MEM and design.target.reaches(place, memory)


def _strides(pattern: Pattern) -> Iterator[int]:
    """Strides that a register holds: those of dimensions with more than one step."""
    for dimension in (*pattern.dimensions, pattern.iteration):
        if dimension is not None and dimension.size > 1:
            yield dimension.stride


def _where(pattern: Pattern) -> str:
    op: Operation = pattern.op
    return f"{op.name} on {pattern.kind} tile {pattern.place}"


RULES = rules_in(globals().values())
