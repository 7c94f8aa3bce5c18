"""TXN 0.1: the instruction stream of one kernel run (`insts.bin`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from uq.errors import BundleError
from uq.formats.xdna.records import U8, U16, U32, Record, Window, pack_words

VERSION = (0, 1)  # major, minor
NPU1, NPU2 = 3, 4  # device generations


@dataclass(frozen=True)
class Header(Record):
    """Start of the stream; `size` in bytes counts the header, too."""

    major: U8
    minor: U8
    generation: U8
    rows: U8
    columns: U8
    memory_rows: U8
    reserved: U16
    count: U32
    size: U32


@dataclass(frozen=True)
class Write:
    """Write one register."""

    address: int
    value: int


@dataclass(frozen=True)
class BlockWrite:
    """Write consecutive registers, e.g. a buffer descriptor."""

    address: int
    data: tuple[int, ...]
    column: int = 0
    row: int = 0

    @property
    def size(self) -> int:
        """Bytes of the whole operation."""
        return 4 * (len(FORMS[BlockWrite]) + len(self.data))


@dataclass(frozen=True)
class MaskWrite:
    """Write the bits of one register that `mask` selects."""

    address: int
    value: int
    mask: int


@dataclass(frozen=True)
class Preempt:
    """A point at which another program may take over."""

    level: int


@dataclass(frozen=True)
class LoadPdi:
    """Load a configuration."""

    id: int
    size: int
    address_low: int
    address_high: int


@dataclass(frozen=True)
class Sync:
    """Wait for the token of a DMA channel; `direction` 0 is into memory (S2MM), 1 out of it."""

    direction: int
    row: int
    column: int
    rows: int
    columns: int
    channel: int


@dataclass(frozen=True)
class Patch:
    """Add the address of kernel argument `argument`, plus `offset` bytes, to a descriptor."""

    address: int
    argument: int
    offset: int = 0
    action: int = 0


Operation = Write | BlockWrite | MaskWrite | Preempt | LoadPdi | Sync | Patch


@dataclass(frozen=True)
class Bits:
    """A field in a part of a word."""

    name: str
    shift: int = 0
    width: int = 32


Part = int | Bits
Word = int | str | tuple[Part, ...]


def _parts(word: Word) -> tuple[Part, ...]:
    if isinstance(word, tuple):
        return word
    return (Bits(word) if isinstance(word, str) else word,)


# The words of each operation: constants, names of fields, or parts. The first has the code. The
# data of a block write follow its words.
FORMS: dict[type[Operation], tuple[Word, ...]] = {
    Write: (0, 0, "address", 0, "value", 24),
    BlockWrite: (1, (Bits("column", 0, 8), Bits("row", 8, 8)), "address", "size"),
    MaskWrite: (3, 0, "address", 0, "value", "mask", 28),
    Preempt: ((6, Bits("level", 8, 8)),),
    LoadPdi: ((8, Bits("id", 16, 16)), "size", "address_low", "address_high"),
    Sync: (
        0x80,
        16,
        (Bits("direction", 0, 8), Bits("row", 8, 8), Bits("column", 16, 8)),
        (Bits("rows", 8, 8), Bits("columns", 16, 8), Bits("channel", 24, 8)),
    ),
    Patch: (0x81, 48, 0, 0, 0, "action", "address", 0, "argument", 0, "offset", 0),
}
KINDS = {_parts(form[0])[0]: kind for kind, form in FORMS.items()}
UNREAD = {  # operations that have a name, but no known form
    2: "BLOCKSET",
    4: "MASKPOLL",
    5: "NOOP",
    7: "MASKPOLL_BUSY",
    9: "LOAD_PM_START",
    10: "CREATE_SCRATCHPAD",
    11: "UPDATE_STATE_TABLE",
    12: "UPDATE_REG",
    13: "UPDATE_SCRATCH",
    14: "CONFIG_SHIMDMA_BD",
    15: "CONFIG_SHIMDMA_BD",
    0x82: "READ_REGS",
    0x83: "RECORD_TIMER",
    0x84: "MERGE_SYNC",
}


@dataclass(frozen=True, kw_only=True)
class Transaction:
    """Operations for one device: NPU1 has 4 columns, NPU2 has 8."""

    operations: tuple[Operation, ...]
    generation: int
    columns: int
    rows: int = 6
    memory_rows: int = 1

    def to_bytes(self) -> bytes:
        """Raises BundleError: a field does not fit into its bits."""
        body = b"".join(map(encode, self.operations))
        header = Header(
            *VERSION,
            generation=self.generation,
            rows=self.rows,
            columns=self.columns,
            memory_rows=self.memory_rows,
            reserved=0,
            count=len(self.operations),
            size=Header.nbytes() + len(body),
        )
        return header.pack() + body


def encode(operation: Operation) -> bytes:
    """Raises BundleError: a field does not fit into its bits."""
    words = (_word(operation, _parts(word)) for word in FORMS[type(operation)])
    data = operation.data if isinstance(operation, BlockWrite) else ()
    return pack_words(*words, *data)


def parse_txn(data: bytes, name: str = "insts.bin") -> Transaction:
    """An instruction stream.

    Raises:
        BundleError: another version, an operation whose form is not known or whose fixed words
            differ, or a count or size that the operations do not have.
    """
    window = Window.of(data, name)
    header = window.record(Header, 0, "header")
    window.expect("version", 0, header.minor << 8 | header.major, VERSION[1] << 8 | VERSION[0])
    window.expect("reserved bits", 6, header.reserved, 0)
    window.expect("size", 12, header.size, len(data))
    operations = []
    offset = Header.nbytes()
    while offset < len(data):
        operation = _operation(window, offset)
        operations.append(operation)
        offset += len(encode(operation))
    window.expect("operations", 8, header.count, len(operations))
    return Transaction(
        operations=tuple(operations),
        generation=header.generation,
        columns=header.columns,
        rows=header.rows,
        memory_rows=header.memory_rows,
    )


def _operation(window: Window, offset: int) -> Operation:
    code = window.words(offset, 1, "operation")[0] & 0xFF
    kind = KINDS.get(code)
    if kind is None:
        name = UNREAD.get(code, "unknown")
        window.refuse("operation", offset, f"the form of code {code:#x} ({name}) is not known")
    form = FORMS[kind]
    words = window.words(offset, len(form), kind.__name__)
    fields: dict[str, Any] = {
        part.name: word >> part.shift & (1 << part.width) - 1
        for parts, word in zip(map(_parts, form), words, strict=True)
        for part in parts
        if isinstance(part, Bits)
    }
    if kind is BlockWrite:
        fields["data"] = _data(window, offset, words[-1])
        del fields["size"]
    operation: Operation = kind(**fields)
    if not encode(operation).startswith(pack_words(*words)):
        window.refuse(kind.__name__, offset, "a word that is fixed has another value")
    return operation


def _data(window: Window, offset: int, size: int) -> tuple[int, ...]:
    """What follows the words of a block write of `size` bytes."""
    count, rest = divmod(size - 4 * len(FORMS[BlockWrite]), 4)
    if count < 0 or rest:
        window.refuse("BlockWrite", offset, f"size {size} is no number of words")
    return window.words(offset + size - 4 * count, count, "BlockWrite data")


def _word(operation: Operation, parts: tuple[Part, ...]) -> int:
    word = 0
    for part in parts:
        if isinstance(part, int):
            word |= part
        else:
            value = getattr(operation, part.name)
            if not 0 <= value < 1 << part.width:
                where = f"{type(operation).__name__}.{part.name}"
                raise BundleError(f"{where}: {value} does not fit into {part.width} bits")
            word |= value << part.shift
    return word
