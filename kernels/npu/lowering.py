"""The runtime sequence as instruction words: what an NPU's command processor executes.

Words are those of the passes aie-dma-to-npu and aie-translate of mlir-aie (March 2026): a transfer
is a descriptor, the patch of its address and a write to its channel's queue; a wait is a sync.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from xdsl.dialects.builtin import ModuleOp
from xdsl.ir import Operation as IrOperation

from uq.errors import DesignError
from uq.formats.xdna.txn import (
    NPU1,
    NPU2,
    BlockWrite,
    MaskWrite,
    Operation,
    Patch,
    Sync,
    Transaction,
    Write,
)
from uq.kernels.npu.dialect.attributes import Direction
from uq.kernels.npu.dialect.sequence import DYNAMIC, DmaWait, MemcpyNd
from uq.kernels.npu.dialect.structure import Device, SequenceOperation
from uq.kernels.npu.dialect.text import flat, integer, memref_type
from uq.kernels.npu.emulator.memory import width_of
from uq.kernels.npu.model import Design, gather
from uq.kernels.npu.target import COLUMNS, MAX_ITERATIONS, WORD, Target
from uq.kernels.npu.tasks import DIRECTIONS, Line, line_of

COLUMN_SHIFT = 25
DESCRIPTORS, DESCRIPTOR_SIZE, ADDRESS_WORD = 0x1D000, 0x20, 4
CONTROL = {Direction.S2MM: 0x1D200, Direction.MM2S: 0x1D210}
CONTROLLER = 0x1F00  # bits of a control register
CHANNEL_SIZE, QUEUE = 8, 4  # registers of a channel: control, then its queue
TOKEN, VALID, CACHE = 1 << 31, 1 << 25, 2 << 24
BURST = {NPU1: 2, NPU2: 3}  # the longest: 256 and 512 bytes
Controllers = Mapping[int, MaskWrite]


def lower(module: ModuleOp, like: Transaction | None = None) -> Transaction:
    """The instructions of a design's runtime sequence.

    Args:
        like: of another sequence of the same design, compiled. A toolchain that gives the tiles
            controller ids writes them in front of each task with a token; they are taken over.

    Raises:
        DesignError: the sequence has an operation, or a transfer a form, that is not lowered here.
    """
    design, sequence = _only(module)
    generation = NPU1 if design.target.name.startswith("npu1") else NPU2
    controllers = _controllers(like.operations if like else ())
    operations: list[Operation] = []
    for op in sequence.body.block.ops:
        operations += _lowered(design, sequence, generation, controllers, op)
    columns = design.target.columns
    return Transaction(operations=tuple(operations), generation=generation, columns=columns)


def _controllers(operations: Sequence[Operation]) -> Controllers:
    """By its register: what sets the controller that a channel sends its tokens to."""
    writes = [op for op in operations if isinstance(op, MaskWrite)]
    return {op.address: op for op in writes if op.mask == CONTROLLER}


def _only(module: ModuleOp) -> tuple[Design, SequenceOperation]:
    devices = [op for op in module.walk() if isinstance(op, Device)]
    if len(devices) != 1 or devices[0].device.data not in COLUMNS:
        raise DesignError("instructions are made for one aie.device that is an NPU")
    name = devices[0].device.data
    design = gather(devices[0], Target(name, COLUMNS[name]))
    if len(design.sequences) != 1:
        raise DesignError(f"there are {len(design.sequences)} runtime sequences; one is needed")
    return design, design.sequences[0]


def _lowered(
    design: Design,
    sequence: SequenceOperation,
    generation: int,
    controllers: Controllers,
    op: IrOperation,
) -> Iterator[Operation]:
    match op:
        case MemcpyNd():
            line, channel = _channel(design, flat(op.metadata))
            yield from _transfer(sequence, generation, controllers, op, line, channel)
        case DmaWait():
            line, channel = _channel(design, flat(op.symbol))
            direction = DIRECTIONS.index(line.direction)
            yield Sync(direction, line.place.row, line.place.column, 1, 1, channel)
        case _:
            raise DesignError(f"{op.name} is not lowered by uq; compile with: uq npu build")


def _channel(design: Design, name: str) -> tuple[Line, int]:
    """The shim channel behind a name. FIFOs take those of a tile in the order of their text."""
    line = line_of(design, name)
    if line is None:
        raise DesignError(f"@{name} is neither a FIFO nor an allocation at a shim tile")
    if line.index is not None:
        return line, line.index
    others = (line_of(design, other) for other in design.fifos)
    mine = [o for o in others if o and (o.place, o.direction) == (line.place, line.direction)]
    taken = {
        allocation.channel_index.value.data
        for other, allocation in design.allocations.items()
        if (found := line_of(design, other))
        and (found.place, found.direction) == (line.place, line.direction)
    }
    free = [channel for channel in range(2) if channel not in taken]
    if mine.index(line) >= len(free):
        raise DesignError(f"@{name}: the shim tile {line.place} has 2 {line.direction} channels")
    return line, free[mine.index(line)]


def _transfer(
    sequence: SequenceOperation,
    generation: int,
    controllers: Controllers,
    op: MemcpyNd,
    line: Line,
    channel: int,
) -> Iterator[Operation]:
    tile = line.place.column << COLUMN_SHIFT
    descriptor = op.id.value.data
    address = tile + DESCRIPTORS + descriptor * DESCRIPTOR_SIZE
    offsets, sizes, strides = _lists(op)
    width = width_of(memref_type(op.memref))
    words, repeats = _descriptor(sizes, strides, width, BURST[generation])
    yield BlockWrite(address, words)
    skipped = sum(a * b for a, b in zip(offsets, strides, strict=True)) * width
    argument = list(sequence.body.block.args).index(op.memref)  # type: ignore[arg-type]
    yield Patch(address + ADDRESS_WORD, argument=argument, offset=skipped)
    control = tile + CONTROL[line.direction] + channel * CHANNEL_SIZE
    # What writes to the host always sends a token.
    token = line.direction is Direction.S2MM or bool(integer(op.issue_token))
    if token and control in controllers:
        yield controllers[control]
    yield Write(control + QUEUE, descriptor | repeats << 16 | token * TOKEN)


def _lists(op: MemcpyNd) -> tuple[list[int], list[int], list[int]]:
    """Offsets, sizes and strides, slowest first."""
    if op.packet is not None or integer(op.burst_length):
        raise DesignError("transfers with packets or a burst length are not lowered by uq")
    lists = op.static_offsets, op.static_sizes, op.static_strides
    offsets, sizes, strides = ([int(n) for n in given.get_values()] for given in lists)
    if DYNAMIC in (*offsets, *sizes, *strides):
        raise DesignError("a transfer with sizes of the run time is not lowered by uq")
    return offsets, sizes, strides


def _descriptor(
    sizes: Sequence[int], strides: Sequence[int], width: int, burst: int
) -> tuple[tuple[int, ...], int]:
    """The eight words of a shim descriptor, and how often its task is repeated.

    Args:
        width: bytes of an element.
    """
    times, d2, d1, d0 = sizes
    if not 1 <= times <= MAX_ITERATIONS:
        raise DesignError(f"a transfer is repeated 1 to {MAX_ITERATIONS} times, not {times}")
    words = [_in_words(d2 * d1 * d0, width), 0, 0, 0, burst << 30, CACHE, 0, VALID]
    steps = [_step(size, step, width) for size, step in zip(sizes, strides, strict=True)]
    if (d2, d1, strides[3]) != (1, 1, 1):
        words[3] = _in_words(d0, width) << 20 | (steps[3] if width == WORD else 0)
        words[4] |= d1 << 20 | steps[2]
        words[5] |= steps[1]
    if times > 1 and strides[0]:
        words[6] = (times - 1) << 20 | steps[0]
    return tuple(words), times - 1


def _step(size: int, step: int, width: int) -> int:
    """As registers have it: in words, less one; 0 where nothing is stepped over."""
    return _in_words(step, width) - 1 if size > 1 and step and step * width >= WORD else 0


def _in_words(count: int, width: int) -> int:
    words, rest = divmod(count * width, WORD)
    if rest:
        raise DesignError(f"a transfer of {count * width} bytes; an NPU moves words of {WORD}")
    return words
