"""Broken and hostile NPU files: one line that names file, section, offset and value, and no
memory beyond a small multiple of the file."""

import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from uq.errors import BundleError, UqError
from uq.formats.xdna.cdo import parse_cdo
from uq.formats.xdna.describe import describe
from uq.formats.xdna.metadata import parse_metadata
from uq.formats.xdna.partition import GroupHead, Head, PdiHead, parse_partition
from uq.formats.xdna.pdi import parse_pdi
from uq.formats.xdna.records import Window
from uq.formats.xdna.sections import Connection, Instance, Memory, parse_table
from uq.formats.xdna.txn import parse_txn
from uq.formats.xdna.xclbin import SectionHead, parse_xclbin

GOLDEN = Path(__file__).parent / "golden" / "xdna"
XCLBIN = (GOLDEN / "npu.xclbin").read_bytes()
HUGE = 0xFFFFFFFF


def patched(offset: int, code: str, *values: int | bytes) -> bytes:
    data = bytearray(XCLBIN)
    struct.pack_into(f"<{code}", data, offset, *values)
    return bytes(data)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"xclbin2", "f: head at 0x0: needs 456 bytes, but 7 are left"),
        (patched(0, "8s", b"xclbin1\0"), r"f: magic at 0x0: expected b'xclbin2\\x00', found"),
        (patched(8, "i", 64), "f: signature length at 0x8: 64: signed files are not read"),
        (patched(0x130, "Q", 7), "f: length at 0x130: expected .*, found 0x7"),
        (XCLBIN[:-1], "f: length at 0x130"),
        (patched(0x1C0, "I", HUGE), "f: section heads at 0x1c8: needs 171798691800 bytes, but"),
        (patched(0x1C8 + 24, "Q", 1 << 60), "f: MEM_TOPOLOGY at 0x1000000000000000: needs 88 byt"),
        (patched(0x1C8 + 32, "Q", 1 << 60), "f: MEM_TOPOLOGY at 0x2e0: needs 1152921504606846976"),
        (patched(0x1C8 + 24, "Q", 0), "f: MEM_TOPOLOGY at 0x0: begins before 0x2e0"),
        (patched(0x1C8 + 24, "Q", 0x340), "f: MEM_TOPOLOGY at 0x340: begins before 0x"),
        (patched(0x1C8 + 4, "16s", b"\xff"), r"f: section heads\[0\]: b'\\xff.* is not UTF-8"),
    ],
)
def test_broken_containers_are_refused(data: bytes, message: str) -> None:
    with pytest.raises(BundleError, match=message):
        parse_xclbin(data, "f")


@pytest.mark.parametrize("kind", [Memory, Connection, Instance])
@pytest.mark.parametrize("count", [2, 0x7FFFFFFF, HUGE])
def test_tables_with_wrong_counts_are_refused(
    kind: type[Memory] | type[Connection] | type[Instance], count: int
) -> None:
    data = struct.pack("<I", count) + bytes(kind.nbytes())
    with pytest.raises(BundleError, match=f"t: {kind.__name__} at 0x[48]: needs"):
        parse_table(kind, Window.of(data, "t"))


def test_bytes_behind_a_table_are_refused() -> None:
    with pytest.raises(BundleError, match="t: end at 0x0: expected 0x4, found 0x5"):
        parse_table(Connection, Window.of(bytes(5), "t"))


@pytest.mark.parametrize(
    ("xml", "message"),
    [
        (b"\xff\xfe<\0", "m: byte 0 is not UTF-8"),
        (b"<project>", "m: not valid XML: no element found"),
        (b'<!DOCTYPE a [<!ENTITY b "c">]><a>&b;</a>', "m: a document type declaration is not"),
        (b"<kernel/>", None),
        (b'<kernel type="dpu"/>', "m: kernel: attribute 'name' is missing"),
        (b'<kernel type="dpu" name="K"/>', "m: kernel K: extended-data is missing"),
        (
            b'<kernel type="dpu" name="K"><extended-data dpu_kernel_id="x"/></kernel>',
            "m: kernel K: extended-data.dpu_kernel_id: 'x' is no number",
        ),
        (
            b'<kernel type="dpu" name="K"><extended-data dpu_kernel_id="%s"/></kernel>'
            % (b"9" * 5000),
            "m: kernel K: extended-data.dpu_kernel_id: '9{40}' is no number",
        ),
    ],
)
def test_broken_metadata_is_refused(xml: bytes, message: str | None) -> None:
    if b"kernel" in xml:
        xml = b"<project><platform><device><core>%s</core></device></platform></project>" % xml
    if message is None:
        assert parse_metadata(xml, "m") == ()
        return
    with pytest.raises(BundleError, match=message):
        parse_metadata(xml, "m")


def partition_of_pdis(count: int) -> bytes:
    """A partition whose PDIs all have the same image, the whole section."""
    size = Head.nbytes() + count * PdiHead.nbytes()
    head = Head(0, 0, 0, 0, 0, 1, 0, 0, count, Head.nbytes(), 0).pack()
    return head + PdiHead(bytes(16), size, 0, 0, 0).pack() * count


def partition_of_groups(count: int) -> bytes:
    """A partition whose PDIs all have the same groups."""
    groups = Head.nbytes() + count * PdiHead.nbytes()
    head = Head(0, 0, 0, 0, 0, 1, 0, 0, count, Head.nbytes(), 0).pack()
    pdis = PdiHead(bytes(16), 0, 0, count, groups).pack() * count
    return head + pdis + GroupHead(0, 1, 1, 0, 0, 0, 0).pack() * count


def sections_of_one_payload(count: int) -> bytes:
    head = bytearray(XCLBIN[:0x1C8])
    start = 0x1C8 + 40 * count
    struct.pack_into("<Q", head, 0x130, start + 100_000)
    struct.pack_into("<I", head, 0x1C0, count)
    return bytes(head) + SectionHead(0, "", start, 100_000).pack() * count + bytes(100_000)


def partitions_of_one_cdo(count: int) -> bytes:
    """A PDI whose partition headers all point to the same data."""
    one = (GOLDEN / "long.pdi").read_bytes()
    words = list(struct.unpack("<32I", one[0x10:0x90]))
    words[3] = count
    words[31] = ~sum(words[:31]) & HUGE
    image = list(struct.unpack("<16I", one[0x90:0xD0]))
    image[1] = count
    image[15] = ~sum(image[:15]) & HUGE
    part = list(struct.unpack("<32I", one[0xD0:0x150]))
    part[8] = (0xD0 + 128 * count) // 4
    part[31] = ~sum(part[:31]) & HUGE
    headers = struct.pack("<48I", *words, *image) + struct.pack("<32I", *part) * count
    return one[:0x10] + headers + one[0x150:]


BILLION_LAUGHS = "<!DOCTYPE a [<!ENTITY a0 'ha'>{}]><project>&a20;</project>".format(
    "".join(f"<!ENTITY a{i + 1} '&a{i};&a{i};&a{i};&a{i};'>" for i in range(20))
).encode()
ATTACKS: dict[str, tuple[bytes, Callable[[bytes], object], str]] = {
    "same image": (
        partition_of_pdis(2000),
        lambda data: parse_partition(Window.of(data, "p")),
        "p: PDI 0 image at 0x0: 192184 bytes were read before as something else",
    ),
    "same groups": (
        partition_of_groups(2000),
        lambda data: parse_partition(Window.of(data, "p")),
        "p: PDI 1 CDO groups at .*: 192000 bytes were read before as something else",
    ),
    "same payload": (
        sections_of_one_payload(5000),
        lambda data: parse_xclbin(data, "f"),
        "f: BITSTREAM at 0x30f08: begins before 0x495a8",
    ),
    "same CDO": (
        partitions_of_one_cdo(2000),
        lambda data: parse_pdi(data, "f"),
        "f: partition 1 data offset at 0x150: expected",
    ),
    "entities": (BILLION_LAUGHS, lambda data: parse_metadata(data, "m"), "m: a document type"),
    "long command": (
        struct.pack("<7I", 4, 0x4F4443, 0x200, 2, 0xFFB0B9B6, 0xFF0111, HUGE),
        lambda data: parse_cdo(data, "f"),
        "f: commands: command 0x111 at 0x8: needs 17179869180 bytes, but 0 are left",
    ),
    "long block": (
        struct.pack("<8I", 0x06030100, 0x104, 1, 32, 1, 0, 0, 0xFFFFFFF0),
        lambda data: parse_txn(data, "f"),
        "f: BlockWrite data at 0x20: needs 4294967264 bytes",
    ),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_attacks_are_refused_in_little_memory(name: str) -> None:
    data, parse, message = ATTACKS[name]
    tracemalloc.start()
    try:
        with pytest.raises(BundleError, match=message):
            parse(data)
        assert tracemalloc.get_traced_memory()[1] < 20 * len(data) + 100_000
    finally:
        tracemalloc.stop()


def test_messages_stay_on_one_line(tmp_path: Path) -> None:
    path = tmp_path / "two\nlines.xclbin"
    path.write_bytes(patched(0x1C8 + 32, "Q", 1 << 60))
    with pytest.raises(BundleError) as caught:
        describe(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("data", [b"", b"\x7fELF", b"\x00\x01\x03\x06"])
def test_other_files_are_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "file.bin").write_bytes(data)
    with pytest.raises(BundleError, match="file.bin: no xclbin, PDI, CDO or instruction stream"):
        describe(tmp_path / "file.bin")


def test_missing_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UqError, match="none.xclbin: No such file or directory"):
        describe(tmp_path / "none.xclbin")
