"""xclbin files against AMD's XRT library and against C structures.

`golden/xdna/npu.txt` is what XRT 2022.10 (Debian: libxrt-dev) printed for `npu.xclbin`;
`python tests/test_xdna_xclbin.py` builds and runs `golden/xdna/xrt_dump.cpp` again. That library
knows no AIE_PARTITION, whose layout is compared with C structures, written down apart from ours.
"""

import ctypes
import subprocess
from collections.abc import Iterator
from ctypes import c_char, c_int32, c_uint8, c_uint16, c_uint32, c_uint64
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from uuid import UUID

import pytest

from uq.errors import BundleError
from uq.formats.xdna.build import MEMORIES, SRAM, build_xclbin, npu_kernel
from uq.formats.xdna.metadata import GLOBAL, Kernel, pack_metadata, parse_metadata
from uq.formats.xdna.partition import AiePartition, Group, PdiEntry, parse_partition
from uq.formats.xdna.records import Window
from uq.formats.xdna.sections import Connection, Instance, Memory, pack_table, parse_table
from uq.formats.xdna.xclbin import Kind, Section, Xclbin, content_uuid, parse_xclbin

GOLDEN = Path(__file__).parent / "golden" / "xdna"
UUIDS = bytes(range(16)), bytes(range(16, 32))
PARTITION = AiePartition(
    column_width=4,
    start_columns=(0, 4),
    pdis=(
        PdiEntry(b"first image", (Group(1, (0x901,)),), UUIDS[0]),
        PdiEntry(b"second", (Group(2, (0x902, 0x903), "OTHER", 3, ()),), UUIDS[1]),
    ),
)
KERNELS = (npu_kernel(), npu_kernel("SECOND", kernel_id=0x902, instance="ONE", buffers=2))
FILE = build_xclbin(KERNELS, PARTITION)


class CHeader(ctypes.Structure):
    """struct axlf up to its sections, with the alignment that a C compiler gives it."""

    _fields_ = [
        ("magic", c_char * 8),
        ("signature_length", c_int32),
        ("reserved", c_uint8 * 28),
        ("key_block", c_uint8 * 256),
        ("unique_id", c_uint64),
        ("length", c_uint64),
        ("time_stamp", c_uint64),
        ("feature_rom_time_stamp", c_uint64),
        ("version_patch", c_uint16),
        ("version_major", c_uint8),
        ("version_minor", c_uint8),
        ("mode", c_uint16),
        ("action_mask", c_uint16),
        ("interface_uuid", c_uint8 * 16),
        ("platform", c_char * 64),
        ("uuid", c_uint8 * 16),
        ("debug", c_char * 16),
        ("section_count", c_uint32),
    ]


class CSection(ctypes.Structure):
    _fields_ = [("kind", c_uint32), ("name", c_char * 16), ("offset", c_uint64), ("size", c_uint64)]


class CArray(ctypes.Structure):
    _fields_ = [("size", c_uint32), ("offset", c_uint32)]


class CInfo(ctypes.Structure):
    _fields_ = [("column_width", c_uint16), ("pad", c_uint8 * 6), ("starts", CArray)]
    _fields_ += [("reserved", c_uint8 * 72)]


class CPartition(ctypes.Structure):
    _fields_ = [
        ("schema", c_uint8),
        ("pad", c_uint8 * 3),
        ("name", c_uint32),
        ("operations_per_cycle", c_uint32),
        ("inference_fingerprint", c_uint64),
        ("pre_post_fingerprint", c_uint64),
        ("info", CInfo),
        ("pdis", CArray),
        ("commit", c_uint32),
        ("reserved", c_uint8 * 52),
    ]


class CPdi(ctypes.Structure):
    _fields_ = [("uuid", c_uint8 * 16), ("image", CArray), ("groups", CArray)]
    _fields_ += [("reserved", c_uint8 * 64)]


class CGroup(ctypes.Structure):
    _fields_ = [
        ("name", c_uint32),
        ("type", c_uint8),
        ("pad", c_uint8 * 3),
        ("pdi_id", c_uint64),
        ("kernels", CArray),
        ("pre", CArray),
        ("reserved", c_uint8 * 64),
    ]


def dump() -> Iterator[str]:
    """What `xrt_dump.cpp` should print for FILE, from what FILE was made of."""
    yield f"uuid {UUID(bytes=FILE.uuid)}"
    for i, memory in enumerate(MEMORIES):
        sizes = f"base {memory.base_address:x} KiB {memory.size:x}"
        yield f"memory {i} {memory.tag} {sizes} used 1 type 2"
    for kernel in KERNELS:
        yield f"kernel {kernel.name}"
        for a in kernel.arguments:
            yield f"argument {a.id} {a.name} offset {a.offset:x} size {a.size:x} type {a.type}"
        yield f"instance {kernel.name}:{kernel.instances[0]}"
        for argument in kernel.arguments:
            if argument.qualifier == GLOBAL:
                memory = MEMORIES[argument.name == "instr"]
                yield f"connection {argument.name} {memory.tag}"


def run_xrt() -> str:
    """What XRT prints for the recorded file."""
    with TemporaryDirectory() as folder:
        program = f"{folder}/xrt_dump"
        source = str(GOLDEN / "xrt_dump.cpp")
        libraries = ("-lxrt_coreutil", "-luuid")
        command = ("g++", "-std=c++17", "-I/usr/include/xrt", source, "-o", program, *libraries)
        subprocess.run(command, check=True)
        result = subprocess.run((program, GOLDEN / "npu.xclbin"), check=True, capture_output=True)
        return result.stdout.decode()


def test_file_is_the_one_that_xrt_has_read() -> None:
    assert FILE.to_bytes() == (GOLDEN / "npu.xclbin").read_bytes()


def test_xrt_found_what_the_file_was_made_of() -> None:
    assert (GOLDEN / "npu.txt").read_text().splitlines() == list(dump())


def test_file_is_read_back() -> None:
    assert parse_xclbin(FILE.to_bytes()) == FILE


def test_head_has_the_layout_of_c() -> None:
    file = replace(FILE, platform="npu", version=(2, 19, 7), mode=1, action_mask=2, time_stamp=99)
    data = replace(file, interface_uuid=UUIDS[0], unique_id=5).to_bytes()
    head = CHeader.from_buffer_copy(data)
    assert ctypes.sizeof(CHeader) == 0x1C8
    assert (head.magic, head.signature_length, head.length) == (b"xclbin2", -1, len(data))
    assert set(bytes(head.reserved) + bytes(head.key_block)) == {0xFF}
    assert (head.version_major, head.version_minor, head.version_patch) == (2, 19, 7)
    assert (head.mode, head.action_mask, head.time_stamp, head.unique_id) == (1, 2, 99, 5)
    assert (bytes(head.interface_uuid), head.platform) == (UUIDS[0], b"npu")
    assert (bytes(head.uuid), head.section_count) == (FILE.uuid, len(FILE.sections))


def test_section_heads_have_the_layout_of_c() -> None:
    data = FILE.to_bytes()
    heads = (CSection * len(FILE.sections)).from_buffer_copy(data, 0x1C8)
    assert ctypes.sizeof(CSection) == 40
    for head, section in zip(heads, FILE.sections, strict=True):
        assert (head.kind, head.name, head.offset % 8) == (section.kind, b"", 0)
        assert data[head.offset : head.offset + head.size] == section.data


def test_partition_has_the_layout_of_c() -> None:
    data = PARTITION.to_bytes()
    head = CPartition.from_buffer_copy(data)
    assert [ctypes.sizeof(kind) for kind in (CPartition, CPdi, CGroup)] == [184, 96, 96]
    assert data[head.name : head.name + 8] == b"QoS\0\0\0\0\0"
    assert (head.operations_per_cycle, head.info.column_width) == (2048, 4)
    assert (head.inference_fingerprint, head.pre_post_fingerprint) == (23423, 12345)
    assert numbers(data, head.info.starts, c_uint16) == [0, 4]
    pdis = (CPdi * head.pdis.size).from_buffer_copy(data, head.pdis.offset)
    images = [data[pdi.image.offset :][: pdi.image.size] for pdi in pdis]
    assert images == [b"first image", b"second"]
    assert [bytes(pdi.uuid) for pdi in pdis] == list(UUIDS)
    group = CGroup.from_buffer_copy(data, pdis[1].groups.offset)
    assert (data[group.name : group.name + 6], group.type, group.pdi_id) == (b"OTHER\0", 3, 2)
    assert numbers(data, group.kernels, c_uint64) == [0x902, 0x903]
    assert group.pre.size == 0
    group = CGroup.from_buffer_copy(data, pdis[0].groups.offset)
    assert numbers(data, group.pre, c_uint64) == [0xC1]


def numbers(data: bytes, array: CArray, kind: Any) -> list[int]:
    return list((kind * array.size).from_buffer_copy(data, array.offset))


def test_partition_items_are_in_order_and_aligned() -> None:
    data = PARTITION.to_bytes()
    head = CPartition.from_buffer_copy(data)
    first, second = (CPdi * 2).from_buffer_copy(data, head.pdis.offset)
    group = CGroup.from_buffer_copy(data, first.groups.offset)
    offsets = [head.name, head.commit, head.info.starts.offset, first.image.offset, group.name]
    offsets += [group.kernels.offset, group.pre.offset, first.groups.offset, second.image.offset]
    assert offsets == [184, 192, 200, 208, 224, 232, 240, 248, 344]
    assert head.pdis.offset == len(data) - 2 * 96


def test_partition_is_read_back() -> None:
    assert parse_partition(Window.of(PARTITION.to_bytes(), "p")) == PARTITION


@pytest.mark.parametrize(
    ("kind", "row", "text"),
    [
        (
            Memory,
            Memory(2, 1, 0x10000, 0x4000000, "HOST"),
            "01000000 00000000 02 01 000000000000 0000010000000000 0000000400000000"
            "484f5354 000000000000000000000000",
        ),
        (Connection, Connection(1, 0, SRAM), "01000000 01000000 00000000 01000000"),
        (
            Instance,
            Instance(7, 0x09010001, (1 << 64) - 1, "A:B"),
            "01000000 00000000 07000000 01000109 ffffffffffffffff 413a42" + "00" * 61,
        ),
    ],
)
def test_tables_have_exact_bytes(kind: Any, row: Any, text: str) -> None:
    assert pack_table(kind, [row]) == bytes.fromhex(text)
    assert parse_table(kind, Window.of(bytes.fromhex(text), "t")) == (row,)


def test_ip_layout_names_the_kernel_id() -> None:
    section = FILE.find(Kind.IP_LAYOUT)
    assert section
    rows = parse_table(Instance, Window.of(section.data, "t"))
    assert [(row.name, row.kernel_id) for row in rows] == [
        ("MLIR_AIE:MLIRAIE", 0x901),
        ("SECOND:ONE", 0x902),
    ]


def test_groups_are_the_memories() -> None:
    data = {section.kind: section.data for section in FILE.sections}
    assert data[Kind.GROUP_TOPOLOGY] == data[Kind.MEM_TOPOLOGY]
    assert data[Kind.GROUP_CONNECTIVITY] == data[Kind.CONNECTIVITY]


def test_metadata_is_read_back() -> None:
    assert parse_metadata(pack_metadata(KERNELS), "m") == KERNELS


def test_metadata_escapes_names() -> None:
    kernel = Kernel('a<b>&"c"', 1, (), ("i",))
    assert parse_metadata(pack_metadata([kernel]), "m") == (kernel,)


def test_equal_content_has_an_equal_uuid() -> None:
    other = (Section(Kind.PDI, b"1"), Section(Kind.PDI, b"23"))
    assert build_xclbin(KERNELS, PARTITION).uuid == FILE.uuid
    assert content_uuid(other) != content_uuid((Section(Kind.PDI, b"12"), Section(Kind.PDI, b"3")))
    assert UUID(bytes=FILE.uuid).version == 8


def test_kernels_without_a_group_are_refused() -> None:
    with pytest.raises(BundleError, match="kernel K: id 0x904 is in no CDO group"):
        build_xclbin([npu_kernel("K", kernel_id=0x904)], PARTITION)


def test_unknown_memories_are_refused() -> None:
    with pytest.raises(BundleError, match="MLIR_AIE.instr: there is no memory 2"):
        build_xclbin([npu_kernel()], PARTITION, memory_of={"instr": 2})


def test_texts_that_do_not_fit_are_refused() -> None:
    with pytest.raises(BundleError, match="SectionHead.name: '.*' is too long"):
        Xclbin(sections=(Section(0, b"", "a" * 17),), uuid=bytes(16)).to_bytes()


if __name__ == "__main__":
    (GOLDEN / "npu.xclbin").write_bytes(FILE.to_bytes())
    (GOLDEN / "npu.txt").write_text(run_xrt())
