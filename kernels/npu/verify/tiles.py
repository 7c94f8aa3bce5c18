"""Rules for tiles and what stands on them: kinds, locks, buffers, memory, channels."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from itertools import pairwise

from xdsl.dialects.builtin import IndexType
from xdsl.ir import Operation

from uq.kernels.npu.dialect.attributes import Direction
from uq.kernels.npu.dialect.structure import (
    Buffer,
    Core,
    Lock,
    Mem,
    MemTileDma,
    ShimDma,
    Tile,
    UseLock,
)
from uq.kernels.npu.dialect.text import integer
from uq.kernels.npu.model import Design, allocation_place, nbytes, place_of
from uq.kernels.npu.resources import Usage, usage
from uq.kernels.npu.target import DEFAULT_STACK, MAX_LOCK, ROWS, Kind, Place
from uq.kernels.npu.verify.rule import (
    AIE_VERIFIER,
    BUFFER_PASS,
    FIFO_PASS,
    REGISTERS,
    TARGET_MODEL,
    Problem,
    rule,
    rules_in,
)

KINDS: dict[type[Operation], tuple[Kind, ...]] = {
    Core: (Kind.CORE,),
    Mem: (Kind.CORE,),
    MemTileDma: (Kind.MEM,),
    ShimDma: (Kind.SHIM,),
    Buffer: (Kind.CORE, Kind.MEM),
}


@rule("tile.range", "A tile lies inside the array of the device.", TARGET_MODEL)
def tile_range(design: Design) -> Iterator[Problem]:
    columns = design.target.columns
    for tile in design.tiles:
        place = Place(tile.col.value.data, tile.row.value.data)
        if design.kind(place) is None:
            size = f"columns 0 to {columns - 1} and rows 0 to {ROWS - 1}"
            yield Problem(tile, f"tile {place}: {design.target.name} has {size}")


@rule("tile.operand", "What stands on a tile names an aie.tile.", AIE_VERIFIER)
def tile_operand(design: Design) -> Iterator[Problem]:
    for op in design.device.walk():
        if not op.name.startswith("aie.") or isinstance(op, UseLock):
            continue
        for operand in op.operands:
            if isinstance(operand.type, IndexType) and not isinstance(operand.owner, Tile):
                yield Problem(op, f"{op.name}: its operand is not an aie.tile")


@rule("tile.order", "With object FIFOs, every tile is declared before the first core.", FIFO_PASS)
def tile_order(design: Design) -> Iterator[Problem]:
    core_seen = False
    for op in design.device.body.block.ops:
        core_seen = core_seen or isinstance(op, Core)
        if isinstance(op, Tile) and core_seen and design.fifos:
            place = Place(op.col.value.data, op.row.value.data)
            yield Problem(op, f"tile {place} stands after a core; move the tiles to the top")


@rule("tile.kind", "Cores, memories, DMAs and buffers stand on tiles that have them.", TARGET_MODEL)
def tile_kind(design: Design) -> Iterator[Problem]:
    for op in design.device.walk():
        allowed = KINDS.get(type(op))
        kind = design.kind(place := place_of(op.operands[0])) if allowed else None
        if allowed and kind and kind not in allowed:
            wanted = " or ".join(allowed)
            yield Problem(op, f"{op.name} needs a {wanted} tile; {place} is a {kind} tile")


@rule("tile.shim", "A shim allocation names a channel of a shim tile.", TARGET_MODEL)
def tile_shim(design: Design) -> Iterator[Problem]:
    for op in design.allocations.values():
        place = allocation_place(op)
        if design.kind(place) is not Kind.SHIM:
            yield Problem(op, f"@{op.sym_name.data}: {place} is not a shim tile of the device")


@rule("tile.once", "A tile has one core, one aie.mem and one memtile_dma.", AIE_VERIFIER)
def tile_once(design: Design) -> Iterator[Problem]:
    seen: set[tuple[str, Place]] = set()
    for op in (*(core.op for core in design.cores), *design.programs):
        if (place := place_of(op.tile)) is None:
            continue
        if (op.name, place) in seen:
            yield Problem(op, f"a second {op.name} on tile {place}")
        seen.add((op.name, place))


@rule("lock.id", "Lock ids are 0 to 15 on shim and core tiles, 0 to 63 on mem tiles.", TARGET_MODEL)
def lock_id(design: Design) -> Iterator[Problem]:
    for lock in design.locks:
        number, limits = integer(lock.lock_id), design.target.limits(place_of(lock.tile))
        if number is not None and limits and not 0 <= number < limits.locks:
            yield Problem(lock, f"lock {number}: this tile has locks 0 to {limits.locks - 1}")


@rule("lock.once", "A lock of a tile is declared once.", AIE_VERIFIER)
def lock_once(design: Design) -> Iterator[Problem]:
    seen: set[tuple[Place, int]] = set()
    for lock in design.locks:
        place, number = place_of(lock.tile), integer(lock.lock_id)
        if place is None or number is None:
            continue
        if (place, number) in seen:
            yield Problem(lock, f"lock {number} of tile {place} is declared twice")
        seen.add((place, number))


@rule("lock.value", f"A lock counts from 0 to {MAX_LOCK}.", REGISTERS)
def lock_value(design: Design) -> Iterator[Problem]:
    for lock in design.locks:
        value = integer(lock.init)
        if value is not None and not 0 <= value <= MAX_LOCK:
            yield Problem(lock, f"initial value {value}: a lock counts from 0 to {MAX_LOCK}")
    for use in design.ops(UseLock):
        value = integer(use.value)
        if value is not None and not 0 <= value <= MAX_LOCK:
            yield Problem(use, f"value {value}: a lock counts from 0 to {MAX_LOCK}")


@rule("lock.operand", "aie.use_lock names an aie.lock.", AIE_VERIFIER)
def lock_operand(design: Design) -> Iterator[Problem]:
    for use in design.ops(UseLock):
        if not isinstance(use.lock.owner, Lock):
            yield Problem(use, "aie.use_lock: its operand is not an aie.lock")


@rule("buffer.address", "A placed buffer lies inside the memory of its tile.", TARGET_MODEL)
def buffer_address(design: Design) -> Iterator[Problem]:
    for op in design.buffers:
        limits, start = design.target.limits(place_of(op.tile)), integer(op.address)
        if start is None or limits is None:
            continue
        end = start + nbytes(op.buffer.type)
        if start < 0 or end > limits.memory:
            yield Problem(op, f"bytes {start} to {end} of a memory of {limits.memory}")


@rule("buffer.overlap", "Placed buffers of a tile do not overlap.", BUFFER_PASS)
def buffer_overlap(design: Design) -> Iterator[Problem]:
    placed: defaultdict[Place | None, list[tuple[int, int, Buffer]]] = defaultdict(list)
    for op in design.buffers:
        if (start := integer(op.address)) is not None:
            end = start + nbytes(op.buffer.type)
            placed[place_of(op.tile)].append((start, end, op))
    for buffers in placed.values():
        for (_, end, _), (start, _, op) in pairwise(sorted(buffers, key=lambda b: b[:2])):
            if start < end:
                yield Problem(op, f"begins at byte {start}, before the end {end} of another buffer")


@rule("memory.core", "Stack and buffers of a core fit into its 64 KB.", BUFFER_PASS)
def memory_core(design: Design) -> Iterator[Problem]:
    for tile, used in _usage(design, Kind.CORE):
        core = design.core_at.get(_place(tile))
        stack = (integer(core.op.stack_size) or DEFAULT_STACK) if core else 0
        room = 64 * 1024 - stack - design.reserved
        if used.nbytes > room:
            parts = f"{used.nbytes} bytes of buffers, {stack} of stack, {design.reserved} reserved"
            yield Problem(tile, f"tile {_place(tile)}: {parts}; a core has {64 * 1024}")


@rule(
    "memory.memtile",
    "Buffers of a mem tile fit into its 512 KB; the FIFO pass moves others to a neighbour.",
    FIFO_PASS,
    severity="warning",
)
def memory_memtile(design: Design) -> Iterator[Problem]:
    for tile, used in _usage(design, Kind.MEM):
        if used.nbytes > 512 * 1024:
            text = (
                f"tile {_place(tile)}: {used.nbytes} bytes of buffers; a mem tile has {512 * 1024}"
            )
            yield Problem(tile, f"{text}, the rest goes to the next column without a message")


@rule("tile.channels", "A tile has 2 DMA channels each way, a mem tile 6.", TARGET_MODEL)
def tile_channels(design: Design) -> Iterator[Problem]:
    for tile, used in _usage(design):
        limits = design.target.limits(_place(tile))
        for direction in Direction:
            count = used.channels(direction)
            if limits and count > limits.channels:
                text = f"tile {_place(tile)}: {count} {direction} channels"
                yield Problem(tile, f"{text}; it has {limits.channels}")


@rule("tile.descriptors", "A tile has 16 buffer descriptors, a mem tile 48.", TARGET_MODEL)
def tile_descriptors(design: Design) -> Iterator[Problem]:
    for tile, used in _usage(design):
        limits = design.target.limits(_place(tile))
        if limits and used.descriptors > limits.descriptors:
            text = f"tile {_place(tile)}: {used.descriptors} buffer descriptors"
            yield Problem(tile, f"{text}; it has {limits.descriptors}")


@rule("tile.locks", "A tile has 16 locks, a mem tile 64.", TARGET_MODEL)
def tile_locks(design: Design) -> Iterator[Problem]:
    for tile, used in _usage(design):
        limits = design.target.limits(_place(tile))
        if limits and used.locks > limits.locks:
            text = f"tile {_place(tile)}: {used.locks} locks"
            yield Problem(tile, f"{text}; it has {limits.locks}")


def _place(tile: Tile) -> Place:
    return Place(tile.col.value.data, tile.row.value.data)


def _usage(design: Design, kind: Kind | None = None) -> Iterator[tuple[Tile, Usage]]:
    """The first declaration of each tile (of one kind) with what it takes."""
    used = usage(design)
    for place, tile in {_place(tile): tile for tile in reversed(design.tiles)}.items():
        if design.kind(place) is not None and kind in (None, design.kind(place)):
            yield tile, used[place]


RULES = rules_in(globals().values())
