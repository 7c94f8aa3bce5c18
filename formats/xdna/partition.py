"""The AIE_PARTITION section of an xclbin: PDIs, and which columns and kernels they are for."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Annotated, TypeVar

from uq.formats.xdna.records import U32, U64, Record, Window, pack_numbers, pad

R = TypeVar("R", bound=Record)

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
        return head.pack() + bytes(heap.data)


def parse_partition(window: Window) -> AiePartition:
    """The section in `window`.

    Raises:
        BundleError: an item lies outside, or the items together are larger than the section.
    """
    head = window.record(Head, 0, "head")
    items = _Items(window)
    pdis = items.records(PdiHead, head.pdi_count, head.pdi_offset, "PDIs")
    return AiePartition(
        column_width=head.column_width,
        start_columns=items.numbers("H", head.start_count, head.start_offset, "start columns"),
        pdis=tuple(_read_pdi(items, pdi, f"PDI {i}") for i, pdi in enumerate(pdis)),
        name=items.text(head.name, "name"),
        kernel_commit_id=items.text(head.kernel_commit_id, "kernel commit id"),
        schema=head.schema,
        operations_per_cycle=head.operations_per_cycle,
        inference_fingerprint=head.inference_fingerprint,
        pre_post_fingerprint=head.pre_post_fingerprint,
    )


class _Heap:
    """What follows the head, written item by item."""

    def __init__(self) -> None:
        self.data = bytearray()

    def put(self, item: bytes) -> int:
        """The offset of `item` in the section."""
        offset = Head.nbytes() + len(self.data)
        self.data += pad(item, ALIGNMENT)
        return offset

    def text(self, text: str) -> int:
        return self.put(text.encode() + b"\0")

    def numbers(self, code: str, values: Sequence[int]) -> int:
        return self.put(pack_numbers(code, values))


def _pack_pdi(heap: _Heap, pdi: PdiEntry) -> bytes:
    image = heap.put(pdi.image)
    groups = heap.put(b"".join([_pack_group(heap, group) for group in pdi.groups]))
    return PdiHead(pdi.uuid, len(pdi.image), image, len(pdi.groups), groups).pack()


def _pack_group(heap: _Heap, group: Group) -> bytes:
    return GroupHead(
        name=heap.text(group.name),
        type=group.type,
        pdi_id=group.pdi_id,
        kernel_count=len(group.kernel_ids),
        kernel_offset=heap.numbers("Q", group.kernel_ids),
        pre_count=len(group.pre_groups),
        pre_offset=heap.numbers(PRE_CDO_CODE, group.pre_groups),
    ).pack()


class _Items:
    """Reads the items of a section. An honest section stores each once, so that all of them
    together are no larger than it; more is refused before it is copied."""

    def __init__(self, window: Window) -> None:
        self.window = window
        self.left = len(window.data)

    def take(self, size: int, offset: int, what: str) -> memoryview:
        data = self.window.take(offset, size, what)
        self.left -= size
        if self.left < 0:
            self.window.refuse(what, offset, f"{size} bytes were read before as something else")
        return data

    def records(self, kind: type[R], count: int, offset: int, what: str) -> tuple[R, ...]:
        if count == 0:
            return ()
        self.take(count * kind.nbytes(), offset, what)
        return self.window.records(kind, offset, count, what)

    def numbers(self, code: str, count: int, offset: int, what: str) -> tuple[int, ...]:
        if count == 0:
            return ()
        data = self.take(count * struct.calcsize(code), offset, what)
        return struct.unpack(f"<{count}{code}", data)

    def text(self, offset: int, what: str) -> str:
        text = self.window.text(offset, what)
        self.take(len(text.encode()), offset, what)
        return text


def _read_pdi(items: _Items, head: PdiHead, what: str) -> PdiEntry:
    image = bytes(items.take(head.image_size, head.image_offset, f"{what} image"))
    groups = items.records(GroupHead, head.group_count, head.group_offset, f"{what} CDO groups")
    read = (_read_group(items, group, f"{what} group {i}") for i, group in enumerate(groups))
    return PdiEntry(image, tuple(read), head.uuid)


def _read_group(items: _Items, head: GroupHead, what: str) -> Group:
    kernels = items.numbers("Q", head.kernel_count, head.kernel_offset, f"{what} kernel ids")
    before = items.numbers(PRE_CDO_CODE, head.pre_count, head.pre_offset, f"{what} pre groups")
    return Group(head.pdi_id, kernels, items.text(head.name, f"{what} name"), head.type, before)
