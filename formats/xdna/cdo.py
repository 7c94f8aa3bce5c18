"""CDO v2: the list of register writes that configures an AIE partition."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import IntEnum

from uq.formats.xdna.records import U32, Record, Window, inverted_sum, pack_words

MAGIC = 0x004F4443  # "CDO"
VERSION = 0x0200
HEADER_WORDS = 4  # the words of the header after the first
LONG = 0xFF  # payload length that says: the next word has the length


class Opcode(IntEnum):
    """Commands of the general module."""

    END = 0x100
    MASK_POLL = 0x101
    MASK_WRITE = 0x102
    WRITE = 0x103
    DELAY = 0x104
    DMA_WRITE = 0x105
    MASK_POLL64 = 0x106
    MASK_WRITE64 = 0x107
    WRITE64 = 0x108
    DMA_XFER = 0x109
    KEYHOLE = 0x10D
    NOP = 0x111
    MARKER = 0x119


@dataclass(frozen=True)
class Header(Record):
    """`length` counts the words after the header."""

    words: U32
    magic: U32
    version: U32
    length: U32
    checksum: U32


@dataclass(frozen=True)
class Command:
    """One command.

    Attributes:
        opcode: command in the low byte, module in the high byte.
        payload: 32-bit words, as bytes.
    """

    opcode: int
    payload: bytes = b""

    @classmethod
    def of(cls, opcode: int, *words: int) -> Command:
        return cls(opcode, pack_words(*words))

    @property
    def name(self) -> str:
        return Opcode(self.opcode).name if self.opcode in set(Opcode) else f"{self.opcode:#05x}"

    @property
    def length(self) -> int:
        """Words of the payload."""
        return len(self.payload) // 4

    @property
    def words(self) -> tuple[int, ...]:
        return Window.of(self.payload, self.name).words(0, self.length, "payload")

    def to_bytes(self) -> bytes:
        """The shortest form."""
        if self.length < LONG:
            return pack_words(self.length << 16 | self.opcode) + self.payload
        return pack_words(LONG << 16 | self.opcode, self.length) + self.payload


@dataclass(frozen=True)
class Cdo:
    """Commands, encoded: there may be millions, so they are decoded one at a time."""

    body: bytes

    @classmethod
    def of(cls, commands: Iterable[Command]) -> Cdo:
        return cls(b"".join(command.to_bytes() for command in commands))

    def commands(self, where: str = "CDO") -> Iterator[Command]:
        """The commands in order.

        Raises:
            BundleError: a command runs over the end.
        """
        window = Window(memoryview(self.body), where)
        offset = 0
        while offset < len(self.body):
            command, offset = _command(window, offset)
            yield command

    def to_bytes(self) -> bytes:
        first = pack_words(HEADER_WORDS, MAGIC, VERSION, len(self.body) // 4)
        return first + pack_words(inverted_sum(first)) + self.body


def parse_cdo(data: bytes, name: str = "CDO") -> Cdo:
    """A CDO file that is checked to its last command.

    Raises:
        BundleError: another version, a wrong checksum, a command that is cut short, bytes left.
    """
    window = Window.of(data, name)
    cdo, end = read_cdo(window)
    if end != len(data):
        window.refuse("end", end, f"{len(data) - end} bytes follow")
    return cdo


def read_cdo(window: Window) -> tuple[Cdo, int]:
    """The CDO at the start of `window`, and the offset behind it."""
    header = window.record(Header, 0, "header")
    window.expect("header length", 0, header.words, HEADER_WORDS)
    window.expect("magic", 4, header.magic, MAGIC)
    window.expect("version", 8, header.version, VERSION)
    window.expect("checksum", 16, header.checksum, inverted_sum(window.data[:16]))
    body = window.part(Header.nbytes(), 4 * header.length, "commands")
    cdo = Cdo(bytes(body.data))
    for _ in cdo.commands(body.where):
        pass
    return cdo, Header.nbytes() + len(cdo.body)


def _command(window: Window, offset: int) -> tuple[Command, int]:
    """The command at `offset`, and the offset behind it."""
    (word,) = window.words(offset, 1, "command")
    opcode, length, start = word & 0xFFFF, word >> 16, offset + 4
    if length > LONG:
        window.refuse("command", offset, f"bits 24 to 31 of {word:#010x} are not zero")
    if length == LONG:
        (length,) = window.words(start, 1, "command length")
        start += 4
    payload = window.take(start, 4 * length, f"command {opcode:#x}")
    return Command(opcode, bytes(payload)), start + 4 * length
