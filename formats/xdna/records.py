"""Little-endian records as dataclasses, and windows that never read past their end."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import cache
from typing import Annotated, NoReturn, Self, TypeVar, get_args, get_type_hints

from uq.errors import BundleError
from uq.formats.decode import printable

U8 = Annotated[int, "B"]
U16 = Annotated[int, "H"]
U32 = Annotated[int, "I"]
I32 = Annotated[int, "i"]
U64 = Annotated[int, "Q"]

R = TypeVar("R", bound="Record")


class Record:
    """Base of frozen dataclasses that mirror bytes.

    Every field is `Annotated` with its `struct` code; padding follows the field before it
    (`"B6x"`). A `str` field is UTF-8, filled up with zeros.
    """

    @classmethod
    def size(cls) -> int:
        """Bytes of one record."""
        return _layout(cls).size

    @classmethod
    def unpack(cls, data: bytes | memoryview, where: str) -> Self:
        """Raises BundleError: a text is not UTF-8."""
        values = zip(_fields(cls).values(), _layout(cls).unpack(data), strict=True)
        return cls(*(_text(value, where) if kind is str else value for (kind, _), value in values))

    def pack(self) -> bytes:
        """Raises BundleError: a number or a text does not fit into its field."""
        kind = type(self)
        return b"".join(
            _pack_field(f"{kind.__name__}.{name}", code, getattr(self, name))
            for name, (_, code) in _fields(kind).items()
        )


@cache
def _fields(kind: type[Record]) -> dict[str, tuple[type, str]]:
    """Type and `struct` code of each field."""
    hints = get_type_hints(kind, include_extras=True)
    return {name: get_args(hint) for name, hint in hints.items()}


@cache
def _layout(kind: type[Record]) -> struct.Struct:
    return struct.Struct("<" + "".join(code for _, code in _fields(kind).values()))


def _pack_field(where: str, code: str, value: int | str | bytes) -> bytes:
    stored = value.encode() if isinstance(value, str) else value
    if isinstance(stored, bytes) and len(stored) > struct.calcsize(code.rstrip("0123456789x")):
        raise BundleError(f"{where}: {value!r} is too long")
    try:
        return struct.pack(f"<{code}", stored)
    except struct.error as error:
        raise BundleError(f"{where}: {value!r}: {error}") from error


def _text(value: bytes, where: str) -> str:
    try:
        return value.partition(b"\0")[0].decode()
    except UnicodeDecodeError as error:
        raise BundleError(f"{where}: {value[:40]!r} is not UTF-8") from error


@dataclass(frozen=True)
class Window:
    """A part of a file that was read into memory.

    Attributes:
        where: names the part in messages, e.g. `final.xclbin: MEM_TOPOLOGY`.
    """

    data: memoryview
    where: str

    @classmethod
    def of(cls, data: bytes, name: str) -> Window:
        """A whole file."""
        return cls(memoryview(data), printable(name))

    def take(self, offset: int, size: int, what: str) -> memoryview:
        """Raises BundleError: the window ends before `offset + size`."""
        if offset > len(self.data) or size > len(self.data) - offset:
            self.refuse(what, offset, f"needs {size} bytes, but {self._left(offset)} are left")
        return self.data[offset : offset + size]

    def record(self, kind: type[R], offset: int, what: str) -> R:
        return kind.unpack(self.take(offset, kind.size(), what), f"{self.where}: {what}")

    def records(self, kind: type[R], offset: int, count: int, what: str) -> tuple[R, ...]:
        """`count` records one after the other; none is read if not all are there."""
        if count < 0:
            self.refuse(what, offset, f"count {count} is negative")
        self.take(offset, count * kind.size(), what)
        starts = range(offset, offset + count * kind.size(), kind.size())
        return tuple(self.record(kind, start, f"{what}[{i}]") for i, start in enumerate(starts))

    def words(self, offset: int, count: int, what: str) -> tuple[int, ...]:
        """`count` unsigned 32-bit words."""
        return struct.unpack(f"<{count}I", self.take(offset, 4 * count, what))

    def part(self, offset: int, size: int, what: str) -> Window:
        return Window(self.take(offset, size, what), f"{self.where}: {what}")

    def refuse(self, what: str, offset: int, problem: str) -> NoReturn:
        raise BundleError(f"{self.where}: {what} at {offset:#x}: {problem}")

    def expect(self, what: str, offset: int, found: int, expected: int) -> None:
        """Raises BundleError: a field that has one legal value has another."""
        if found != expected:
            self.refuse(what, offset, f"expected {expected:#x}, found {found:#x}")

    def _left(self, offset: int) -> int:
        return max(0, len(self.data) - offset)


def pack_words(*values: int) -> bytes:
    """Unsigned 32-bit words.

    Raises:
        BundleError: a value is negative or has more than 32 bits.
    """
    try:
        return struct.pack(f"<{len(values)}I", *values)
    except struct.error as error:
        worst = next(value for value in values if not 0 <= value < 1 << 32)
        raise BundleError(f"{worst:#x} does not fit into 32 bits") from error


def pad(data: bytes, alignment: int) -> bytes:
    """`data`, filled up with zeros to a multiple of `alignment` bytes."""
    return data + bytes(-len(data) % alignment)


def inverted_sum(data: bytes | memoryview) -> int:
    """Checksum of PDI and CDO headers: one's complement of the sum of the words, modulo 2^32."""
    return ~sum(struct.unpack(f"<{len(data) // 4}I", data)) & 0xFFFFFFFF
