"""Tasks of a sequence: chains of descriptors that are configured, started, awaited and freed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from xdsl.ir import Block, Operation, SSAValue

from uq.errors import DesignError
from uq.formats.xdna.txn import Operation as Instruction
from uq.formats.xdna.txn import Patch
from uq.kernels.npu.dialect.dma import DmaBd, NextBd
from uq.kernels.npu.dialect.structure import Buffer, UseLock
from uq.kernels.npu.dialect.tasks import TaskOperation
from uq.kernels.npu.dialect.text import integer
from uq.kernels.npu.lowering.channels import Channel
from uq.kernels.npu.lowering.descriptors import (
    Fields,
    argument_of,
    bd_fields,
    lock_fields,
    packet_fields,
)
from uq.kernels.npu.lowering.tiles import Tiles
from uq.kernels.npu.target import LIMITS, Kind, Place
from uq.kernels.npu.verify.descriptors import MEM_BANK


@dataclass(frozen=True)
class Task:
    channel: Channel
    numbers: tuple[int, ...]  # of its descriptors, in the order of the text
    token: bool
    repeat: int


class Tasks:
    def __init__(self, tiles: Tiles) -> None:
        self.tiles = tiles
        self.known: dict[Operation | Block, Task] = {}
        self.taken: defaultdict[Place, set[int]] = defaultdict(set)

    def of(self, value: SSAValue) -> Task:
        if (task := self.known.get(value.owner)) is None:
            raise DesignError("the operand is no task that was configured before")
        return task

    def free(self, task: Task) -> None:
        self.taken[task.channel.place] -= set(task.numbers)

    def configure(self, op: TaskOperation, channel: Channel) -> Iterator[Instruction]:
        blocks = [block for block in op.body.blocks if _descriptors(block)]
        if not blocks:
            raise DesignError(f"{op.name}: it has no aie.dma_bd")
        chain = {block: _descriptors(block)[0] for block in blocks}
        numbers = self._number(list(chain.values()), channel.place)
        token, repeat = bool(integer(op.issue_token)), integer(op.repeat_count) or 0
        self.known[op] = Task(channel, tuple(numbers.values()), token, repeat)
        for block, bd in chain.items():
            following = _next(block)
            if following is not None and following not in chain:
                raise DesignError("aie.next_bd: its block has no aie.dma_bd")
            after = numbers[chain[following]] if following is not None else integer(bd.next_bd_id)
            yield from self._descriptor(channel, block, numbers[bd], after)

    def _number(self, chain: list[DmaBd], place: Place) -> dict[DmaBd, int]:
        """Ids that the text gives, and the lowest free ones for the others."""
        taken = self.taken[place]
        given = {bd: number for bd in chain if (number := integer(bd.bd_id)) is not None}
        for number in given.values():
            if number in taken:
                raise DesignError(f"descriptor {number} of tile {place} is in use; free its task")
            taken.add(number)
        kind = self.tiles.kind(place)
        most = MEM_BANK if kind is Kind.MEM else LIMITS[kind].descriptors
        for bd in chain:
            if bd not in given:
                free = next((number for number in range(most) if number not in taken), None)
                if free is None:
                    raise DesignError(f"tile {place} has no free descriptor; free tasks")
                given[bd] = free
                taken.add(free)
        return {bd: given[bd] for bd in chain}

    def _descriptor(
        self, channel: Channel, block: Block, number: int, after: int | None
    ) -> Iterator[Instruction]:
        (bd,) = _descriptors(block)
        place, kind = channel.place, self.tiles.kind(channel.place)
        fields, offset = bd_fields(bd)
        locks = lock_fields([op for op in block.ops if isinstance(op, UseLock)], kind, place)
        chained: Fields = {} if after is None else {"use_next_bd": 1, "next_bd": after}
        packet = packet_fields(channel.packet)
        fields = {**packet, **fields, **locks, **chained, "buffer_offset": offset, "valid_bd": 1}
        yield self.tiles.descriptor(place, number, fields, integer(bd.burst_length) or 0)
        argument, start = argument_of(bd.buffer)
        if argument is not None and kind is Kind.SHIM:
            register = self.tiles.address_register(place, number)
            yield Patch(register, argument.index, offset + start)
        elif isinstance(buffer := bd.buffer.owner, Buffer):
            yield self.tiles.point(place, number, buffer, offset)
        else:
            raise DesignError(f"{bd.name}: a {kind} tile does not reach this buffer")


def _descriptors(block: Block) -> list[DmaBd]:
    found = [op for op in block.ops if isinstance(op, DmaBd)]
    if len(found) > 1:
        raise DesignError(f"a block with {len(found)} descriptors; it takes one")
    return found


def _next(block: Block) -> Block | None:
    last = block.last_op
    return last.dest if isinstance(last, NextBd) else None
