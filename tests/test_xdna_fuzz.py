"""Valid NPU files with random damage: a reader answers with a value or a UqError of one line."""

import re
import struct
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzzing import INTERESTING, Edit, Format, accepts, edit_lists, is_read
from uq.formats.xdna import describe
from uq.formats.xdna.cdo import parse_cdo
from uq.formats.xdna.metadata import pack_metadata, parse_metadata
from uq.formats.xdna.partition import parse_partition
from uq.formats.xdna.pdi import parse_pdi
from uq.formats.xdna.raw_kernel import parse_raw_kernel
from uq.formats.xdna.records import Window
from uq.formats.xdna.txn import (
    NPU1,
    BlockWrite,
    LoadPdi,
    MaskWrite,
    Patch,
    Preempt,
    Sync,
    Transaction,
    parse_txn,
)
from uq.formats.xdna.txn import Write as WriteRegister
from uq.formats.xdna.xclbin import Kind, parse_xclbin
from uq.kernels.npu.source import parse_design, print_design
from uq.kernels.npu.verify import verify

GOLDEN = Path(__file__).parent / "golden" / "xdna"
XCLBIN = (GOLDEN / "npu.xclbin").read_bytes()
SECTIONS = {section.kind: section.data for section in parse_xclbin(XCLBIN).sections}
PDIS = [(GOLDEN / f"{name}.pdi").read_bytes() for name in ("mlir-aie", "partitions", "random-0")]
CDOS = [parse_pdi(pdi).partitions[0].cdo.to_bytes() for pdi in PDIS]
TXN = Transaction(
    operations=(
        WriteRegister(0x1D214, 5),
        BlockWrite(0x1D000, (1024, 0, 0, 0, 2 << 30, 2 << 24, 0, 1 << 25)),
        MaskWrite(0x1D200, 0xF00, 0x1F00),
        Preempt(1),
        LoadPdi(1, 64, 0x1000, 0),
        Sync(0, 0, 0, 1, 1, 0),
        Patch(0x1D004, 1),
    ),
    generation=NPU1,
    columns=4,
).to_bytes()
# Short, so that many are read: FIFOs and a core, buffers and locks, transfers, tasks.
DESIGNS = [
    b"""aie.device(npu1) {
  %s = aie.tile(0, 0)
  %c = aie.tile(0, 2)
  aie.objectfifo @in(%s, {%c}, 2 : i32) : !aie.objectfifo<memref<8xi32>>
  aie.core(%c) {
    %v = aie.objectfifo.acquire @in(Consume, 1) : !aie.objectfifosubview<memref<8xi32>>
    aie.objectfifo.release @in(Consume, 1)
    aie.end
  } {link_with = "k.o"}
}""",
    b"""aie.device(npu2) {
  %m = aie.tile(3, 1)
  %b = aie.buffer(%m) {sym_name = "b"} : memref<4xi8>
  %l = aie.lock(%m, 1) {init = 0 : i32}
  aie.memtile_dma(%m) {
    %0 = aie.dma_start(S2MM, 0, ^bd, ^end)
  ^bd:
    aie.use_lock(%l, AcquireGreaterEqual, 1)
    aie.dma_bd(%b : memref<4xi8>, 0, 4, [<size = 1, stride = 4>])
    aie.next_bd ^end
  ^end:
    aie.end
  }
}""",
    b"""aie.device(npu1_1col) {
  %s = aie.tile(0, 0)
  %c = aie.tile(0, 2)
  aie.objectfifo @in(%s, {%c}, [2, 1]) : !aie.objectfifo<memref<8xi32>>
  aie.runtime_sequence(%x : memref<8xi32>) {
    aiex.npu.dma_memcpy_nd (%x[0,0,0,0][1,1,1,8][0,0,0,1]) {metadata = @in, id = 0} : memref<8xi32>
    aiex.npu.dma_wait {symbol = @in}
  }
}""",
    b"""aie.device(npu2) {
  %s = aie.tile(0, 0)
  aie.shim_dma_allocation @out(%s, S2MM, 1)
  aie.runtime_sequence(%x : memref<8xi32>) {
    %t = aiex.dma_configure_task_for @out {
      aie.dma_bd(%x : memref<8xi32>, 0, 8) {bd_id = 3 : i32}
      aie.end
    } {issue_token = true}
    aiex.dma_start_task(%t)
    aiex.dma_await_task(%t)
  }
}""",
]
NUMBER, WORD = re.compile(rb"\d+"), re.compile(rb"[%@!^]?[\w.]+")


def set_number(data: bytearray, place: int, value: int) -> None:
    """The first number behind a place."""
    if found := NUMBER.search(data, place):
        data[found.start() : found.end()] = str(INTERESTING[value % len(INTERESTING)] - 2).encode()


def set_word_of_text(data: bytearray, place: int, value: int) -> None:
    """The first word behind a place becomes another one of the text."""
    words = list(WORD.finditer(data))
    if words and (found := WORD.search(data, place)):
        data[found.start() : found.end()] = words[value % len(words)].group()


def cut_line(data: bytearray, place: int, value: int) -> None:
    del data[_line(data, place)]


def move_line(data: bytearray, place: int, value: int) -> None:
    """A copy of a line to some other place, between lines."""
    line, at = data[_line(data, place)], _line(data, value % len(data)).start
    data[at:at] = line


def _line(data: bytearray, place: int) -> slice:
    return slice(data.rfind(b"\n", 0, place) + 1, data.find(b"\n", place) + 1 or len(data))


TEXT_EDITS = (set_number, set_word_of_text, cut_line, move_line)


def damage_text(data: bytes, edits: Sequence[Edit]) -> bytes:
    """The same design with other numbers, words and lines."""
    damaged = bytearray(data)
    for edit in edits:
        if damaged:
            place = edit.place % len(damaged)
            TEXT_EDITS[edit.kind % len(TEXT_EDITS)](damaged, place, edit.value)
    return bytes(damaged)


def seal(data: bytearray, start: int, words: int) -> None:
    """A header checksum after `words` words, as far as there are any."""
    end = start + 4 * words
    if end + 4 <= len(data):
        total = sum(struct.unpack_from(f"<{words}I", data, start))
        struct.pack_into("<I", data, end, ~total & 0xFFFFFFFF)


def mend_cdo(data: bytes) -> bytes:
    mended = bytearray(data)
    seal(mended, 0, 4)
    return bytes(mended)


def mend_pdi(data: bytes) -> bytes:
    mended = bytearray(data)
    seal(mended, 0x10, 31)
    seal(mended, 0x90, 15)
    count = min(int.from_bytes(data[0x1C:0x20], "little"), len(data) // 128)
    for start in range(0xD0, 0xD0 + 128 * count, 128):
        seal(mended, start, 31)
        if start + 36 <= len(data):
            seal(mended, 4 * int.from_bytes(data[start + 32 : start + 36], "little"), 4)
    return bytes(mended)


def mend_txn(data: bytes) -> bytes:
    return data[:12] + struct.pack("<I", len(data)) + data[16:]


def mend_xclbin(data: bytes) -> bytes:
    return data[:0x130] + struct.pack("<Q", len(data)) + data[0x138:]


def read_txn(data: bytes) -> None:
    assert parse_txn(data).to_bytes() == data


def read_cdo(data: bytes) -> None:
    assert parse_cdo(data).to_bytes() == data


def read_pdi(data: bytes) -> None:
    pdi = parse_pdi(data)
    assert parse_pdi(pdi.to_bytes()) == pdi


def read_partition(data: bytes) -> None:
    partition = parse_partition(Window.of(data, "partition"))
    assert parse_partition(Window.of(partition.to_bytes(), "partition")) == partition


def read_metadata(data: bytes) -> None:
    kernels = parse_metadata(data, "metadata")
    assert parse_metadata(pack_metadata(kernels), "metadata") == kernels


def read_xclbin(data: bytes) -> None:
    file = parse_xclbin(data)
    assert parse_xclbin(file.to_bytes()) == file
    describe.describe_bytes(data, "file")


def read_design(data: bytes) -> None:
    """What is legal IR is also printed and read again."""
    source = parse_design(data.decode("latin-1"))
    rules = {finding.rule for report in verify(source) for finding in report.findings}
    if "ir.operation" not in rules:
        again = parse_design(print_design(source.module)).module
        assert source.module.is_structurally_equivalent(again)


FORMATS = {
    "xclbin": Format([XCLBIN], read_xclbin, mend_xclbin),
    "partition": Format([SECTIONS[Kind.AIE_PARTITION]], read_partition, bytes),
    "metadata": Format([SECTIONS[Kind.EMBEDDED_METADATA]], read_metadata, bytes),
    "pdi": Format(PDIS, read_pdi, mend_pdi),
    "cdo": Format(CDOS, read_cdo, mend_cdo),
    "txn": Format([TXN], read_txn, mend_txn),
    "raw": Format([b"AUPN" + bytes(40), b"NPUA" + bytes(90)], parse_raw_kernel, bytes),
    "mlir": Format(DESIGNS, read_design, structured=damage_text),
}


@pytest.mark.parametrize("name", FORMATS)
@settings(
    max_examples=150,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
@given(sample=st.integers(0, 2), edits=edit_lists, mend=st.booleans())
def test_damaged_files_are_read_or_refused(
    name: str, sample: int, edits: list[Edit], mend: bool
) -> None:
    assert accepts(FORMATS[name], sample, edits, mend) or edits


@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=50, derandomize=True, database=None, deadline=None)
@given(data=st.binary(max_size=300))
def test_random_bytes_are_read_or_refused(name: str, data: bytes) -> None:
    is_read(FORMATS[name], data)
