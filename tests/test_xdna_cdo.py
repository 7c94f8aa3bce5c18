import struct

import pytest

from uq.errors import BundleError
from uq.formats.xdna.cdo import Cdo, Command, Opcode, parse_cdo

WRITE = Command.of(Opcode.WRITE, 0x1D214, 5)
# WRITE, MASK_WRITE, END by hand; the checksum is ~(4 + 0x4f4443 + 0x200 + 8).
BYTES = bytes.fromhex(
    "04000000 43444f00 00020000 08000000 b0b9b0ff"
    "03010200 14d20100 05000000"
    "02010300 00200300 01000000 01000000"
    "00010000"
)


def with_words(data: bytes, **words: int) -> bytes:
    """`data` with words replaced: `with_words(data, w2=0x300)`."""
    patched = bytearray(data)
    for name, value in words.items():
        struct.pack_into("<I", patched, 4 * int(name[1:]), value)
    return bytes(patched)


def sealed(*body: int) -> bytes:
    head = (4, 0x4F4443, 0x200, len(body))
    return struct.pack(f"<{5 + len(body)}I", *head, ~sum(head) & 0xFFFFFFFF, *body)


def test_commands_have_exact_bytes() -> None:
    commands = [WRITE, Command.of(Opcode.MASK_WRITE, 0x32000, 1, 1), Command(Opcode.END)]
    assert Cdo.of(commands).to_bytes() == BYTES
    assert list(parse_cdo(BYTES).commands()) == commands


@pytest.mark.parametrize(("length", "head"), [(254, (0xFE0105,)), (255, (0xFF0105, 255))])
def test_payloads_of_255_words_have_a_length_word(length: int, head: tuple[int, ...]) -> None:
    command = Command.of(Opcode.DMA_WRITE, *range(length))
    assert command.to_bytes() == struct.pack(f"<{len(head) + length}I", *head, *range(length))
    assert parse_cdo(sealed(*head, *range(length))) == Cdo.of([command])


def test_long_form_of_a_short_command_is_read_and_kept() -> None:
    data = sealed(0xFF0103, 2, 0x1D214, 5)
    assert list(parse_cdo(data).commands()) == [WRITE]
    assert parse_cdo(data).to_bytes() == data


def test_unknown_opcodes_are_named_by_number() -> None:
    assert [command.name for command in Cdo(bytes.fromhex("05020000")).commands()] == ["0x205"]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (BYTES[:19], "f.cdo: header at 0x0: needs 20 bytes, but 19 are left"),
        (with_words(BYTES, w0=5), "f.cdo: header length at 0x0: expected 0x4, found 0x5"),
        (with_words(BYTES, w1=0x584C4E58), "f.cdo: magic at 0x4: .* found 0x584c4e58"),
        (with_words(BYTES, w2=0x300), "f.cdo: version at 0x8: expected 0x200, found 0x300"),
        (with_words(BYTES, w4=0), "f.cdo: checksum at 0x10: expected 0xffb0b9b0, found 0x0"),
        (BYTES[:-4], "f.cdo: commands at 0x14: needs 32 bytes, but 28 are left"),
        (BYTES + bytes(4), "f.cdo: end at 0x34: 4 bytes follow"),
        (sealed(0x30103, 1, 2), "f.cdo: commands: command 0x103 at 0x4: needs 12 bytes, but 8"),
        (sealed(0xFF0103), "f.cdo: commands: command length at 0x4: needs 4 bytes, but 0"),
        (sealed(0xFF0103, 0xFFFFFFFF), "f.cdo: commands: command 0x103 at 0x8: needs 17179869180"),
        (sealed(0x01000111), "bits 24 to 31 of 0x01000111 are not zero"),
    ],
)
def test_broken_files_are_refused(data: bytes, message: str) -> None:
    with pytest.raises(BundleError, match=message):
        parse_cdo(data, "f.cdo")


def test_values_of_more_than_32_bits_are_refused() -> None:
    with pytest.raises(BundleError, match="0x100000000 is no unsigned number of 32 bits"):
        Command.of(Opcode.WRITE, 1 << 32, 0)
