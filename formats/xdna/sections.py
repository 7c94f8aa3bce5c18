"""The sections of an xclbin that are tables: memories, kernels, and what connects them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, TypeVar

from uq.formats.xdna.records import I32, U8, U32, U64, Record, Window, pack_numbers

MEM_DRAM = 2
IP_PS_KERNEL = 7
SUBTYPE_DPU = 1
FUNCTIONAL_DPU = 0
NO_ADDRESS = 0xFFFFFFFFFFFFFFFF


@dataclass(frozen=True)
class Memory(Record):
    """A row of MEM_TOPOLOGY and GROUP_TOPOLOGY; `size` in KiB."""

    type: U8
    used: Annotated[int, "B6x"]
    size: U64
    base_address: U64
    tag: Annotated[str, "16s"]


@dataclass(frozen=True)
class Connection(Record):
    """A row of CONNECTIVITY and GROUP_CONNECTIVITY: argument of an instance -> memory."""

    argument: I32
    instance: I32
    memory: I32


@dataclass(frozen=True)
class Instance(Record):
    """A row of IP_LAYOUT.

    Attributes:
        properties: of a kernel, `dpu_properties` makes them.
        name: `kernel:instance`.
    """

    type: U32
    properties: U32
    base_address: U64
    name: Annotated[str, "64s"]

    @property
    def kernel_id(self) -> int:
        return self.properties >> 16 & 0xFFF


R = TypeVar("R", bound=Record)
COUNT_BYTES: dict[type[Record], int] = {Memory: 8, Instance: 8, Connection: 4}  # with padding


def dpu_properties(kernel_id: int) -> int:
    """Subtype in bits 0-1, function in bits 4-5, 12 bits of kernel id from bit 16."""
    return SUBTYPE_DPU | FUNCTIONAL_DPU << 4 | kernel_id << 16


def pack_table(kind: type[R], rows: Sequence[R]) -> bytes:
    """Raises BundleError: a field does not fit."""
    count = pack_numbers("I", [len(rows)]).ljust(COUNT_BYTES[kind], b"\0")
    return count + b"".join(row.pack() for row in rows)


def parse_table(kind: type[R], window: Window) -> tuple[R, ...]:
    """Raises BundleError: the rows are fewer or more than the count says."""
    (count,) = window.words(0, 1, "count")
    start = COUNT_BYTES[kind]
    rows = window.records(kind, start, count, kind.__name__)
    window.expect("end", 0, len(window.data), start + count * kind.nbytes())
    return rows
