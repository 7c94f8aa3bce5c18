"""xclbin (axlf): the container of everything that XRT loads on an NPU."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Annotated

from uq.formats.xdna.records import I32, U8, U16, U32, U64, Record, Window

MAGIC = b"xclbin2\0"
UNSIGNED = -1
ALIGNMENT = 8


class Kind(IntEnum):
    """Kinds of sections."""

    BITSTREAM = 0
    CLEARING_BITSTREAM = 1
    EMBEDDED_METADATA = 2
    FIRMWARE = 3
    DEBUG_DATA = 4
    SCHED_FIRMWARE = 5
    MEM_TOPOLOGY = 6
    CONNECTIVITY = 7
    IP_LAYOUT = 8
    DEBUG_IP_LAYOUT = 9
    DESIGN_CHECK_POINT = 10
    CLOCK_FREQ_TOPOLOGY = 11
    MCS = 12
    BMC = 13
    BUILD_METADATA = 14
    KEYVALUE_METADATA = 15
    USER_METADATA = 16
    DNA_CERTIFICATE = 17
    PDI = 18
    BITSTREAM_PARTIAL_PDI = 19
    PARTITION_METADATA = 20
    EMULATION_DATA = 21
    SYSTEM_METADATA = 22
    SOFT_KERNEL = 23
    ASK_FLASH = 24
    AIE_METADATA = 25
    GROUP_TOPOLOGY = 26
    GROUP_CONNECTIVITY = 27
    SMARTNIC = 28
    AIE_RESOURCES = 29
    OVERLAY = 30
    VENDER_METADATA = 31
    AIE_PARTITION = 32
    IP_METADATA = 33
    AIE_RESOURCES_BIN = 34
    AIE_TRACE_METADATA = 35
    DTBO = 36


@dataclass(frozen=True)
class Head(Record):
    """Start of the file."""

    magic: Annotated[bytes, "8s"]
    signature_length: I32
    reserved: Annotated[bytes, "28s"]
    key_block: Annotated[bytes, "256s"]
    unique_id: U64
    length: U64
    time_stamp: U64
    feature_rom_time_stamp: U64
    version_patch: U16
    version_major: U8
    version_minor: U8
    mode: U16
    action_mask: U16
    interface_uuid: Annotated[bytes, "16s"]
    platform: Annotated[str, "64s"]
    uuid: Annotated[bytes, "16s"]
    debug_uuid: Annotated[bytes, "16s"]
    section_count: Annotated[int, "I4x"]


@dataclass(frozen=True)
class SectionHead(Record):
    """Where a section is."""

    kind: U32
    name: Annotated[str, "16s4x"]
    offset: U64
    size: U64


@dataclass(frozen=True)
class Section:
    """Payload, without padding."""

    kind: int
    data: bytes
    name: str = ""

    @property
    def title(self) -> str:
        return Kind(self.kind).name if self.kind in set(Kind) else f"section kind {self.kind}"


@dataclass(frozen=True, kw_only=True)
class Xclbin:
    """Sections and what the head says about them.

    Attributes:
        uuid: 16 bytes. Drivers tell xclbins apart by it; `content_uuid` makes one.
        time_stamp: seconds since 1970; 0 keeps the bytes reproducible.
        version: major, minor and patch of the tools that wrote the file.
    """

    sections: tuple[Section, ...]
    uuid: bytes
    platform: str = ""
    interface_uuid: bytes = bytes(16)
    time_stamp: int = 0
    unique_id: int = 0
    version: tuple[int, int, int] = (0, 0, 0)
    mode: int = 0
    action_mask: int = 0

    def find(self, kind: int) -> Section | None:
        """The first section of a kind."""
        return next((section for section in self.sections if section.kind == kind), None)

    def to_bytes(self) -> bytes:
        """Raises BundleError: a field does not fit."""
        start = Head.nbytes() + SectionHead.nbytes() * len(self.sections)
        heads, payloads = b"", b""
        for section in self.sections:
            payloads = payloads + bytes(-(start + len(payloads)) % ALIGNMENT)
            offset = start + len(payloads)
            heads += SectionHead(section.kind, section.name, offset, len(section.data)).pack()
            payloads += section.data
        payloads += bytes(-(start + len(payloads)) % ALIGNMENT)
        return self._head(start + len(payloads)).pack() + heads + payloads

    def _head(self, length: int) -> Head:
        major, minor, patch = self.version
        return Head(
            magic=MAGIC,
            signature_length=UNSIGNED,
            reserved=b"\xff" * 28,
            key_block=b"\xff" * 256,
            unique_id=self.unique_id,
            length=length,
            time_stamp=self.time_stamp,
            feature_rom_time_stamp=0,
            version_patch=patch,
            version_major=major,
            version_minor=minor,
            mode=self.mode,
            action_mask=self.action_mask,
            interface_uuid=self.interface_uuid,
            platform=self.platform,
            uuid=self.uuid,
            debug_uuid=bytes(16),
            section_count=len(self.sections),
        )


def content_uuid(sections: Sequence[Section]) -> bytes:
    """A UUID (RFC 9562, version 8) that is equal for equal sections only."""
    digest = hashlib.sha256()
    for section in sections:
        digest.update(SectionHead(section.kind, section.name, 0, len(section.data)).pack())
        digest.update(section.data)
    uuid = bytearray(digest.digest()[:16])
    uuid[6] = uuid[6] & 0x0F | 0x80
    uuid[8] = uuid[8] & 0x3F | 0x80
    return bytes(uuid)


def parse_xclbin(data: bytes, name: str = "xclbin") -> Xclbin:
    """The sections of an xclbin without signature; none of them is looked into.

    Raises:
        BundleError: another magic, a signature, a length that is not the file's, sections that
            overlap or lie outside.
    """
    window = Window.of(data, name)
    head = window.record(Head, 0, "head")
    if head.magic != MAGIC:
        window.refuse("magic", 0, f"expected {MAGIC!r}, found {head.magic!r}")
    if head.signature_length != UNSIGNED:
        window.refuse("signature length", 8, f"{head.signature_length}: signed files are not read")
    window.expect("length", 0x130, head.length, len(data))
    heads = window.records(SectionHead, Head.nbytes(), head.section_count, "section heads")
    _check_overlap(window, heads)
    return Xclbin(
        sections=tuple(_section(window, section) for section in heads),
        uuid=head.uuid,
        platform=head.platform,
        interface_uuid=head.interface_uuid,
        time_stamp=head.time_stamp,
        unique_id=head.unique_id,
        version=(head.version_major, head.version_minor, head.version_patch),
        mode=head.mode,
        action_mask=head.action_mask,
    )


def _check_overlap(window: Window, heads: Sequence[SectionHead]) -> None:
    end = Head.nbytes() + SectionHead.nbytes() * len(heads)
    for head in sorted(heads, key=lambda head: (head.offset, head.size)):
        title = Section(head.kind, b"").title
        if head.offset < end:
            window.refuse(title, head.offset, f"begins before {end:#x}, the end of what is before")
        window.take(head.offset, head.size, title)
        end = head.offset + head.size


def _section(window: Window, head: SectionHead) -> Section:
    data = window.take(head.offset, head.size, "section")
    return Section(head.kind, bytes(data), head.name)
