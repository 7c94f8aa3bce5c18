"""The AIE_PARTITION section of an xclbin: PDIs, and which columns and kernels they are for."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Annotated, TypeVar

from uq.formats.xdna.records import U16, U32, U64, Record, Window, pad

ALIGNMENT = 8
PRE_CDO_CODE = "Q"  # the C header says u32; xclbinutil writes 64 bits


class GroupType(IntEnum):
    """What the commands of a group are for."""

    UNKNOWN = 0
    PRIMARY = 1
    LITE = 2
    PRE_POST = 3


@dataclass(frozen=True)
class Head(Record):
    """Start of the section. Offsets count from here; a count comes before each offset of a list."""

    schema: Annotated[int, "B3x"]
    name: U32
    operations_per_cycle: Annotated[int, "I4x"]
    inference_fingerprint: U64
    pre_post_fingerprint: U64
    column_width: Annotated[int, "H6x"]
    start_count: U32
    start_offset: Annotated[int, "I72x"]
    pdi_count: U32
    pdi_offset: U32
    kernel_commit_id: Annotated[int, "I52x"]


@dataclass(frozen=True)
class PdiHead(Record):
    """One PDI."""

    uuid: Annotated[bytes, "16s"]
    image_size: U32
    image_offset: U32
    group_count: U32
    group_offset: Annotated[int, "I64x"]


@dataclass(frozen=True)
class GroupHead(Record):
    """One CDO group."""

    name: U32
    type: Annotated[int, "B3x"]
    pdi_id: U64
    kernel_count: U32
    kernel_offset: U32
    pre_count: U32
    pre_offset: Annotated[int, "I64x"]


@dataclass(frozen=True)
class Group:
    """Kernels that run on a PDI."""

    pdi_id: int
    kernel_ids: tuple[int, ...]
    name: str = "DPU"
    type: int = GroupType.PRIMARY
    pre_groups: tuple[int, ...] = (0xC1,)


@dataclass(frozen=True)
class PdiEntry:
    """A PDI and its groups; the image is not looked into."""

    image: bytes
    groups: tuple[Group, ...]
    uuid: bytes = bytes(16)


@dataclass(frozen=True, kw_only=True)
class AiePartition:
    """The section. Defaults are those of mlir-aie."""

    column_width: int
    start_columns: tuple[int, ...]
    pdis: tuple[PdiEntry, ...]
    name: str = "QoS"
    kernel_commit_id: str = ""
    schema: int = 0
    operations_per_cycle: int = 2048
    inference_fingerprint: int = 23423
    pre_post_fingerprint: int = 12345

    def to_bytes(self) -> bytes:
        """Raises BundleError: a field does not fit."""
        heap = _Heap()
        name = heap.text(self.name)
        commit = heap.text(self.kernel_commit_id)
        starts = heap.numbers("H", self.start_columns)
        pdis = heap.put(b"".join([_pack_pdi(heap, pdi) for pdi in self.pdis]))
        head = Head(
            schema=self.schema,
            name=name,
            operations_per_cycle=self.operations_per_cycle,
            inference_fingerprint=self.inference_fingerprint,
            pre_post_fingerprint=self.pre_post_fingerprint,
            column_width=self.column_width,
            start_count=len(self.start_columns),
            start_offset=starts,
            pdi_count=len(self.pdis),
            pdi_offset=pdis,
            kernel_commit_id=commit,
        )
        return head.pack() + heap.data
