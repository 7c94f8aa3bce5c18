"""What the NPUs offer: arrays, tiles and the limits of each kind of tile.

Source of the figures: AIETargetModel.h of mlir-aie; for the bit widths AM020 and AIEXDialect.cpp.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from uq.kernels.npu.dialect.attributes import Bundle

ROWS = 6
QUEUE_DEPTH = 4  # tasks that wait in the queue of one channel
MAX_ITERATIONS = 64  # 6 bits, stored minus one
MAX_REPEAT = 255  # 8 bits of the task queue register
MAX_LOCK = 63
PACKET_IDS = 32
WORD = 4  # bytes; the unit of lengths, steps and addresses of a DMA
DEFAULT_STACK = 1024  # bytes


class Place(NamedTuple):
    column: int
    row: int

    def __str__(self) -> str:
        return f"({self.column}, {self.row})"


class Kind(StrEnum):
    SHIM = "shim"
    MEM = "mem"
    CORE = "core"


class Ports(NamedTuple):
    """Ports of one bundle of a stream switch: streams that enter it and that leave it."""

    sources: int
    destinations: int


@dataclass(frozen=True)
class Limits:
    """One kind of tile.

    Attributes:
        memory: data memory in bytes, 0 for none.
        channels: DMA channels of each direction.
        dimensions: of an address generator, the iteration aside.
        max_wrap: largest size of a dimension that is not the slowest, in words when contiguous.
        max_step: largest stride in words.
        max_length: longest transfer of one descriptor in words.
    """

    memory: int
    channels: int
    descriptors: int
    locks: int
    dimensions: int
    max_wrap: int
    max_step: int
    max_length: int
    ports: Mapping[Bundle, Ports]


LIMITS: Mapping[Kind, Limits] = {
    Kind.SHIM: Limits(
        memory=0,
        channels=2,
        descriptors=16,
        locks=16,
        dimensions=3,
        max_wrap=2**10 - 1,
        max_step=2**20,
        max_length=2**32 - 1,
        ports={
            Bundle.DMA: Ports(2, 2),
            Bundle.North: Ports(4, 6),
            Bundle.South: Ports(8, 6),
            Bundle.East: Ports(4, 4),
            Bundle.West: Ports(4, 4),
            Bundle.FIFO: Ports(1, 1),
            Bundle.NOC: Ports(4, 4),
            Bundle.PLIO: Ports(8, 6),
            Bundle.TileControl: Ports(1, 1),
            Bundle.Trace: Ports(1, 0),
        },
    ),
    Kind.MEM: Limits(
        memory=512 * 1024,
        channels=6,
        descriptors=48,
        locks=64,
        dimensions=4,
        max_wrap=2**10 - 1,
        max_step=2**17,
        max_length=2**17 - 1,
        ports={
            Bundle.DMA: Ports(6, 6),
            Bundle.North: Ports(4, 6),
            Bundle.South: Ports(6, 4),
            Bundle.TileControl: Ports(1, 1),
            Bundle.Trace: Ports(1, 0),
        },
    ),
    Kind.CORE: Limits(
        memory=64 * 1024,
        channels=2,
        descriptors=16,
        locks=16,
        dimensions=3,
        max_wrap=2**8 - 1,
        max_step=2**13,
        max_length=2**14 - 1,
        ports={
            Bundle.Core: Ports(1, 1),
            Bundle.DMA: Ports(2, 2),
            Bundle.North: Ports(4, 6),
            Bundle.South: Ports(6, 4),
            Bundle.East: Ports(4, 4),
            Bundle.West: Ports(4, 4),
            Bundle.FIFO: Ports(1, 1),
            Bundle.TileControl: Ports(1, 1),
            Bundle.Trace: Ports(2, 0),
        },
    ),
}

COLUMNS: Mapping[str, int] = {
    "npu1": 4,
    "npu1_4col": 4,  # the name of the same array until June 2025
    **{f"npu1_{n}col": n for n in (1, 2, 3)},
    "npu2": 8,
    **{f"npu2_{n}col": n for n in range(1, 8)},
}


@dataclass(frozen=True)
class Target:
    name: str
    columns: int

    def kind(self, place: Place | None) -> Kind | None:
        """None outside of the array."""
        if place is None or not (0 <= place.column < self.columns and 0 <= place.row < ROWS):
            return None
        return {0: Kind.SHIM, 1: Kind.MEM}.get(place.row, Kind.CORE)

    def limits(self, place: Place | None) -> Limits | None:
        kind = self.kind(place)
        return None if kind is None else LIMITS[kind]

    def reaches(self, user: Place, memory: Place) -> bool:
        """Whether the core, or the DMA of the mem tile, at `user` can use that memory directly.

        A core reaches its own memory and that to the west, north and south of it; its own one
        takes the place of the east. The DMA of a mem tile reaches the mem tiles on both sides.
        """
        kind = self.kind(user)
        if kind is None or kind != self.kind(memory):
            return False
        step = (memory.column - user.column, memory.row - user.row)
        if kind is Kind.CORE:
            return step in ((0, 0), (-1, 0), (0, 1), (0, -1))
        return kind is Kind.MEM and step in ((0, 0), (-1, 0), (1, 0))
