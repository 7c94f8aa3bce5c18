"""Instruction words are those of `aie-translate --aie-npu-to-binary` (mlir-aie, March 2026)."""

import struct

import pytest

from uq.errors import BundleError
from uq.formats.xdna.txn import (
    NPU1,
    NPU2,
    BlockWrite,
    LoadPdi,
    MaskWrite,
    Operation,
    Patch,
    Preempt,
    Sync,
    Transaction,
    Write,
    encode,
    parse_txn,
)

QUEUE = """
06030100 00000104 00000003 00000068
0 0 0001d214 0 5 00000018
80 00000010 0 00010100
81 00000030 0 0 0 0 0001d004 0 0 0 0 0
"""
PASSTHROUGH = """
{head} 00000007 00000110 00000001 00000000 0001d000 00000030
00000400 00000000 00000000 00000000 {burst} 02000000 00000000 02000000
00000081 00000030 00000000 00000000 00000000 00000000 0001d004 00000000
00000000 00000000 00000000 00000000 00000000 00000000 0001d214 00000000
00000000 00000018 00000001 00000000 0001d020 00000030 00000400 00000000
00000000 00000000 {burst} 02000000 00000000 02000000 00000081 00000030
00000000 00000000 00000000 00000000 0001d024 00000000 00000001 00000000
00000000 00000000 00000000 00000000 0001d204 00000000 80000001 00000018
00000080 00000010 00000000 00010100
"""
WAIT = Sync(direction=0, row=0, column=0, rows=1, columns=1, channel=0)


def words(text: str) -> bytes:
    numbers = [int(word, 16) for word in text.split()]
    return struct.pack(f"<{len(numbers)}I", *numbers)


def stream(text: str, count: int = 1) -> bytes:
    """An NPU2 stream of `count` operations, whose words are `text`."""
    body = words(text)
    return words(f"06040100 00000108 {count:x} {16 + len(body):x}") + body


def passthrough(generation: int, columns: int, burst: int) -> Transaction:
    def descriptor(buffer: int) -> BlockWrite:
        return BlockWrite(
            0x1D000 + 0x20 * buffer, (1024, 0, 0, 0, burst << 30, 2 << 24, 0, 1 << 25)
        )

    operations = (
        descriptor(0),
        Patch(0x1D004, argument=0),
        Write(0x1D214, 0),
        descriptor(1),
        Patch(0x1D024, argument=1),
        Write(0x1D204, 1 << 31 | 1),
        WAIT,
    )
    return Transaction(operations=operations, generation=generation, columns=columns)


GOLDEN = {
    "queue": (
        QUEUE,
        Transaction(
            operations=(Write(0x1D214, 5), WAIT, Patch(0x1D004, argument=0)),
            generation=NPU1,
            columns=4,
        ),
    ),
    "passthrough-npu1": (
        PASSTHROUGH.format(head="06030100 00000104", burst="80000000"),
        passthrough(NPU1, 4, 2),
    ),
    "passthrough-npu2": (
        PASSTHROUGH.format(head="06040100 00000108", burst="c0000000"),
        passthrough(NPU2, 8, 3),
    ),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_words_are_written(name: str) -> None:
    text, transaction = GOLDEN[name]
    assert transaction.to_bytes() == words(text)


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_words_are_read(name: str) -> None:
    text, transaction = GOLDEN[name]
    assert parse_txn(words(text)) == transaction


@pytest.mark.parametrize(
    ("operation", "text"),
    [
        (
            BlockWrite(0x1D000, (1024, 0, 0, 0, 0xC0000000, 0x2000000, 0, 0x2000000)),
            "1 0 0001d000 30 00000400 0 0 0 c0000000 02000000 0 02000000",
        ),
        (Patch(0x1D004, argument=0), "81 30 0 0 0 0 0001d004 0 0 0 0 0"),
        (Write(0x1D204, 0x80000002), "0 0 0001d204 0 80000002 18"),
        (WAIT, "80 10 0 00010100"),
        (MaskWrite(0x1D200, 0xF00, 0x1F00), "3 0 0001d200 0 00000f00 00001f00 1c"),
    ],
)
def test_golden_operations_of_other_designs(operation: Operation, text: str) -> None:
    assert encode(operation) == words(text)
    assert parse_txn(stream(text)).operations == (operation,)


# By hand from the table of fields: no tool wrote these.
@pytest.mark.parametrize(
    ("operation", "text"),
    [
        (Preempt(level=2), "206"),
        (LoadPdi(0x1234, 0x100, 0x5678, 0x9), "12340008 100 5678 9"),
        (BlockWrite(4, (), column=3, row=2), "1 203 4 10"),
        (Sync(direction=1, row=2, column=3, rows=4, columns=5, channel=6), "80 10 30201 6050400"),
        (Patch(8, argument=2, offset=64, action=1), "81 30 0 0 0 1 8 0 2 0 40 0"),
    ],
)
def test_fields_have_their_places(operation: Operation, text: str) -> None:
    assert encode(operation) == words(text)
    assert parse_txn(stream(text)).operations == (operation,)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (words("06030100 104 0"), "insts.bin: header at 0x0: needs 16 bytes, but 12 are left"),
        (words("06030200 104 0 10"), "version at 0x0: expected 0x100, found 0x200"),
        (words("06030100 10104 0 10"), "reserved bits at 0x6: expected 0x0, found 0x1"),
        (words("06030100 104 0 14"), "size at 0xc: expected 0x10, found 0x14"),
        (stream("0 0 1 0 5 18", 2), "operations at 0x8: expected 0x1, found 0x2"),
        (stream("0 0 1 0 5"), "Write at 0x10: needs 24 bytes, but 20 are left"),
        (stream("0 0 1 0 5 1c"), "Write at 0x10: a word that is fixed has another value"),
        (stream("0 1 1 0 5 18"), "Write at 0x10: a word that is fixed has another value"),
        (stream("80 10 1000000 0"), "Sync at 0x10: a word that is fixed has another value"),
        (stream("206 4", 2), r"operation at 0x14: the form of code 0x4 \(MASKPOLL\) is not known"),
        (stream("7f"), r"operation at 0x10: the form of code 0x7f \(unknown\) is not known"),
        (stream("1 0 4 f"), "BlockWrite at 0x10: size 15 is no number of words"),
        (stream("1 0 4 12"), "BlockWrite at 0x10: size 18 is no number of words"),
        (stream("1 0 4 fffffff0"), "BlockWrite data at 0x20: needs 4294967264 bytes, but 0 are"),
    ],
)
def test_broken_streams_are_refused(data: bytes, message: str) -> None:
    with pytest.raises(BundleError, match=message):
        parse_txn(data)


@pytest.mark.parametrize(
    ("operation", "message"),
    [
        (Write(-1, 0), "Write.address: -1 does not fit into 32 bits"),
        (Sync(0, 256, 0, 1, 1, 0), "Sync.row: 256 does not fit into 8 bits"),
        (BlockWrite(0, (1 << 32,)), "0x100000000 is no unsigned number of 32 bits"),
    ],
)
def test_values_that_do_not_fit_are_refused(operation: Operation, message: str) -> None:
    with pytest.raises(BundleError, match=message):
        encode(operation)
