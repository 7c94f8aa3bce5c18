"""Little-endian records as dataclasses, and windows that never read past their end."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, NoReturn, Self, TypeVar, get_args, get_type_hints

from uq.errors import BundleError
from uq.formats.decode import printable

U8 = Annotated[int, "B"]
U16 = Annotated[int, "H"]
U32 = Annotated[int, "I"]
I32 = Annotated[int, "i"]
U64 = Annotated[int, "Q"]

MAX_TEXT = 4096
R = TypeVar("R", bound="Record")


class Record:
    """Base of frozen dataclasses that mirror bytes.

    Every field is `Annotated` with its `struct` code; padding follows the field before it
    (`"B6x"`). A `str` field is UTF-8, filled up with zeros.
    """

    _fields: ClassVar[dict[str, tuple[type, str]]]  # type and struct code
    _layout: ClassVar[struct.Struct]

    def __init_subclass__(cls) -> None:
        hints = get_type_hints(cls, include_extras=True)
        cls._fields = {name: get_args(hints[name]) for name in cls.__annotations__}
        cls._layout = struct.Struct("<" + "".join(code for _, code in cls._fields.values()))

    @classmethod
    def nbytes(cls) -> int:
        """Bytes of one record."""
        return cls._layout.size

    @classmethod
    def unpack(cls, data: bytes | memoryview, where: str) -> Self:
        """Raises BundleError: a text is not UTF-8."""
        values = zip(cls._fields.values(), cls._layout.unpack(data), strict=True)
        return cls(*(_text(value, where) if kind is str else value for (kind, _), value in values))

    def pack(self) -> bytes:
        """Raises BundleError: a number or a text does not fit into its field."""
        kind = type(self).__name__
        return b"".join(
            _pack_field(f"{kind}.{name}", code, getattr(self, name))
            for name, (_, code) in self._fields.items()
        )


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
        return kind.unpack(self.take(offset, kind.nbytes(), what), f"{self.where}: {what}")

    def records(self, kind: type[R], offset: int, count: int, what: str) -> tuple[R, ...]:
        """`count` records one after the other; none is read if not all are there."""
        if count < 0:
            self.refuse(what, offset, f"count {count} is negative")
        self.take(offset, count * kind.nbytes(), what)
        starts = range(offset, offset + count * kind.nbytes(), kind.nbytes())
        return tuple(self.record(kind, start, f"{what}[{i}]") for i, start in enumerate(starts))

    def words(self, offset: int, count: int, what: str) -> tuple[int, ...]:
        """`count` unsigned 32-bit words."""
        return struct.unpack(f"<{count}I", self.take(offset, 4 * count, what))

    def text(self, offset: int, what: str) -> str:
        """UTF-8 up to a zero byte."""
        data = bytes(self.take(offset, min(MAX_TEXT, self._left(offset)), what))
        if b"\0" not in data:
            self.refuse(what, offset, f"no end of the text in {len(data)} bytes")
        return _text(data, f"{self.where}: {what}")

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
        BundleError: a value is negative or too large.
    """
    return pack_numbers("I", values)


def pack_numbers(code: str, values: Sequence[int]) -> bytes:
    """Numbers of one `struct` code.

    Raises:
        BundleError: a value is negative or too large.
    """
    try:
        return struct.pack(f"<{len(values)}{code}", *values)
    except struct.error as error:
        bits = 8 * struct.calcsize(f"<{code}")
        worst = next(value for value in values if not 0 <= value < 1 << bits)
        raise BundleError(f"{worst:#x} is no unsigned number of {bits} bits") from error


def pad(data: bytes, alignment: int) -> bytes:
    """`data`, filled up with zeros to a multiple of `alignment` bytes."""
    return data + bytes(-len(data) % alignment)


def inverted_sum(data: bytes | memoryview) -> int:
    """Checksum of PDI and CDO headers: one's complement of the sum of the words, modulo 2^32."""
    words: tuple[int, ...] = struct.unpack(f"<{len(data) // 4}I", data)
    return ~sum(words) & 0xFFFFFFFF
