"""PDI: the image that the NPU's firmware loads. Written as bootgen 2022.2 writes it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import takewhile
from typing import Annotated, TypeVar

from uq.errors import BundleError
from uq.formats.xdna.cdo import LONG, Cdo, Command, Header, Opcode, read_cdo
from uq.formats.xdna.records import U32, Record, Window, inverted_sum, pack_words, pad

SMAP = pack_words(0x000000DD, 0x11223344, 0x55667788, 0x99AABBCC)  # bus width detection
VERSION = 0x00040000
ID_STRING = 0x50504449  # "PPDI", the last letter first
HEADER_SIZES = 0x00201020  # words of the three kinds of header
TABLE_END = 0x30  # words of the headers, without partitions after the first
ALIGNMENT = 16
CDO_ATTRIBUTES = 0x02000006
CDO_TYPE = 2
NO_ADDRESS = 0xFFFFFFFF
MAX_EXTENDED_ID = 0x3F
NPI = range(0xF6000000, 0xF8000000)  # registers outside of the NPU, to which bootgen splits writes


@dataclass(frozen=True)
class TableHeader(Record):
    """Image header table; offsets in words from the start of the file."""

    version: U32
    images: U32
    image_offset: U32
    partitions: U32
    partition_offset: Annotated[int, "I4x"]
    id_code: Annotated[int, "I12x"]
    id_string: U32
    header_sizes: U32
    total_length: Annotated[int, "I16x"]
    extended_id: Annotated[int, "I52x"]


@dataclass(frozen=True)
class ImageHeader(Record):
    """One image: its partitions and its name."""

    partition_offset: U32
    partitions: Annotated[int, "I8x"]
    name: Annotated[str, "16s"]
    id: Annotated[int, "I24x"]


@dataclass(frozen=True)
class PartitionHeader(Record):
    """One partition; lengths and offsets in words."""

    encrypted_length: U32
    length: U32
    total_length: U32
    next_header: Annotated[int, "I8x"]
    load_address_low: U32
    load_address_high: U32
    data_offset: U32
    attributes: U32
    sections: Annotated[int, "I4x"]
    id: Annotated[int, "I72x"]


H = TypeVar("H", bound=Record)


@dataclass(frozen=True)
class Partition:
    """Configuration commands, and the id that the image gives them."""

    cdo: Cdo
    id: int = 0


@dataclass(frozen=True, kw_only=True)
class Pdi:
    """One image. The defaults are those of mlir-aie."""

    partitions: tuple[Partition, ...]
    name: str = "aie_image"
    id: int = 0x1C000000
    id_code: int = 0x14CA8093
    extended_id: int = 1

    def to_bytes(self) -> bytes:
        """The bytes of bootgen, for CDOs made by `merge`.

        Raises:
            BundleError: a field does not fit.
        """
        if self.extended_id > MAX_EXTENDED_ID:
            raise BundleError(f"PDI: extended id {self.extended_id:#x} has more than 6 bits")
        data = [pad(partition.cdo.to_bytes(), ALIGNMENT) for partition in self.partitions]
        headers = [SMAP, *map(_sealed, (self._table(), self._image(), *self._headers(data)))]
        return b"".join(headers + data)

    def _table(self) -> TableHeader:
        image = (len(SMAP) + TableHeader.nbytes() + 4) // 4
        return TableHeader(
            version=VERSION,
            images=1,
            image_offset=image,
            partitions=len(self.partitions),
            partition_offset=_first_header(),
            id_code=self.id_code,
            id_string=ID_STRING,
            header_sizes=HEADER_SIZES,
            total_length=TABLE_END + _header_words() * (len(self.partitions) - 1),
            extended_id=self.extended_id,
        )

    def _image(self) -> ImageHeader:
        return ImageHeader(_first_header(), len(self.partitions), self.name, self.id)

    def _headers(self, data: list[bytes]) -> Iterator[PartitionHeader]:
        first, step, count = _first_header(), _header_words(), len(data)
        offset = first + step * count
        for i, (partition, padded) in enumerate(zip(self.partitions, data, strict=True)):
            yield PartitionHeader(
                encrypted_length=len(padded) // 4,
                length=(Header.nbytes() + len(partition.cdo.body)) // 4,
                total_length=len(padded) // 4,
                next_header=first + step * (i + 1) if i + 1 < count else 0,
                load_address_low=NO_ADDRESS,
                load_address_high=NO_ADDRESS,
                data_offset=offset,
                attributes=CDO_ATTRIBUTES,
                sections=1,
                id=partition.id,
            )
            offset += len(padded) // 4


def merge(cdos: Iterable[Cdo]) -> Cdo:
    """One CDO with the commands of several, as bootgen joins the files of a partition.

    Each file ends at its END command, which is dropped. 64-bit commands below 4 GiB become 32-bit
    ones, one-word DMA writes become register writes, and a NOP before a longer DMA write moves its
    data so that offset in its own file and destination agree in their lowest four bits.

    Raises:
        BundleError: a command or an address whose treatment by bootgen is not known, or no command.
    """
    bodies = [_normal_body(cdo) for cdo in cdos]
    if not bodies or not all(bodies):
        raise BundleError("PDI: a CDO without commands cannot be packed")
    return Cdo(b"".join(bodies))


def _normal_body(cdo: Cdo) -> bytes:
    body = bytearray()
    for command in takewhile(lambda c: c.opcode != Opcode.END, cdo.commands()):
        normal = _normal(command)
        if normal.opcode == Opcode.DMA_WRITE:
            body += _padding(len(body), normal)
        body += normal.to_bytes()
    return bytes(body)


LENGTHS = {
    Opcode.MASK_POLL: (4, 5),
    Opcode.MASK_WRITE: (3,),
    Opcode.WRITE: (2,),
    Opcode.DELAY: (1,),
    Opcode.MASK_POLL64: (5, 6),
    Opcode.MASK_WRITE64: (4,),
    Opcode.WRITE64: (3,),
}
ADDRESS_32 = {
    Opcode.MASK_POLL64: Opcode.MASK_POLL,
    Opcode.MASK_WRITE64: Opcode.MASK_WRITE,
    Opcode.WRITE64: Opcode.WRITE,
}


def _normal(command: Command) -> Command:
    """`command` in the form that bootgen gives it."""
    opcode, words = command.opcode, command.words
    if opcode == Opcode.NOP:
        return command
    if opcode == Opcode.MARKER and words:
        return Command(opcode, _marker(command.payload))
    if opcode == Opcode.DMA_WRITE and len(words) == 3:
        return _narrow(Opcode.WRITE64, words)
    if opcode == Opcode.DMA_WRITE and len(words) >= 2:
        if words[0] == 0 and words[1] in NPI:
            raise BundleError(f"PDI: DMA_WRITE to {words[1]:#x}, which is no address of an NPU")
        return command
    if opcode in LENGTHS and len(words) in LENGTHS[Opcode(opcode)]:
        optional = len(words) > LENGTHS[Opcode(opcode)][0]
        return _narrow(Opcode(opcode), words[:-1] if optional and words[-1] == 0 else words)
    raise BundleError(f"PDI: cannot pack command {command.name} with {len(words)} words")


def _narrow(opcode: Opcode, words: tuple[int, ...]) -> Command:
    """Without the upper half of a 64-bit address, if that is zero."""
    if opcode in ADDRESS_32 and words[0] == 0:
        return Command.of(ADDRESS_32[opcode], *words[1:])
    return Command.of(opcode, *words)


def _marker(payload: bytes) -> bytes:
    """Id and text; the text ends at its first zero."""
    return payload[:4] + pad(payload[4:].partition(b"\0")[0], 4)


def _padding(offset: int, write: Command) -> bytes:
    """The NOP before a DMA write that starts at byte `offset` of a file's commands."""
    data = Header.nbytes() + offset + 4 * (3 if write.length < LONG else 4)
    destination = write.words[1]
    missing = (destination // 4 - data // 4) % 4
    return Command(Opcode.NOP, bytes(4 * (missing - 1))).to_bytes() if missing else b""


def parse_pdi(data: bytes, name: str = "PDI") -> Pdi:
    """A PDI with one image of plain CDO partitions. Bytes without a known meaning are ignored.

    Raises:
        BundleError: another kind or version, a wrong checksum, lengths that disagree.
    """
    window = Window.of(data, name)
    if bytes(window.take(0, len(SMAP), "magic")) != SMAP:
        window.refuse("magic", 0, "not a PDI")
    table = _unsealed(window, TableHeader, len(SMAP), "table")
    for field, expected in (("version", VERSION), ("images", 1), ("id_string", ID_STRING)):
        window.expect(f"table {field}", len(SMAP), getattr(table, field), expected)
    image = _unsealed(window, ImageHeader, 4 * table.image_offset, "image header")
    window.expect("image partitions", 4 * table.image_offset, image.partitions, table.partitions)
    return Pdi(
        partitions=tuple(_partitions(window, table)),
        name=image.name,
        id=image.id,
        id_code=table.id_code,
        extended_id=table.extended_id,
    )


def _partitions(window: Window, table: TableHeader) -> Iterator[Partition]:
    """Partitions follow each other without holes, so that no byte is read twice."""
    start, step = 4 * table.partition_offset, PartitionHeader.nbytes() + 4
    window.take(start, step * table.partitions, "partition headers")
    end = start + step * table.partitions
    for i in range(table.partitions):
        what = f"partition {i}"
        header = _unsealed(window, PartitionHeader, start + i * step, what)
        window.expect(f"{what} data offset", start + i * step, 4 * header.data_offset, end)
        yield _partition(window, header, what)
        end += 4 * header.total_length
    window.expect("end", end, len(window.data), end)


def _partition(window: Window, header: PartitionHeader, what: str) -> Partition:
    offset = 4 * header.data_offset
    window.expect(f"{what} type", offset, header.attributes >> 24 & 0xF, CDO_TYPE)
    window.expect(f"{what} encrypted length", offset, header.encrypted_length, header.total_length)
    part = window.part(offset, 4 * header.total_length, what)
    cdo, end = read_cdo(part)
    part.expect("length", 0, 4 * header.length, end)
    part.expect("padding", end, len(part.data) - end, -end % ALIGNMENT)
    return Partition(cdo, header.id)


def _first_header() -> int:
    """Word offset of the first partition header."""
    return (len(SMAP) + TableHeader.nbytes() + 4 + ImageHeader.nbytes() + 4) // 4


def _header_words() -> int:
    return (PartitionHeader.nbytes() + 4) // 4


def _sealed(header: Record) -> bytes:
    data = header.pack()
    return data + pack_words(inverted_sum(data))


def _unsealed(window: Window, kind: type[H], offset: int, what: str) -> H:
    """A header whose last word is its checksum."""
    header = window.record(kind, offset, what)
    end = offset + kind.nbytes()
    (checksum,) = window.words(end, 1, f"{what} checksum")
    window.expect(f"{what} checksum", end, checksum, inverted_sum(window.data[offset:end]))
    return header
