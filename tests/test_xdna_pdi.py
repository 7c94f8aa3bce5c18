"""PDIs are compared with those of bootgen (Debian: xilinx-bootgen), byte for byte.

Where bootgen is installed it runs on every case; where it is not, its recorded files stand in for
it. `python tests/test_xdna_pdi.py` records them again.
"""

import random
import shutil
import struct
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from uq.errors import BundleError
from uq.formats.xdna.cdo import Cdo, Command, Opcode
from uq.formats.xdna.pdi import LENGTHS, Partition, Pdi, merge, parse_pdi

GOLDEN = Path(__file__).parent / "golden" / "xdna"
END = Command(Opcode.END)
WRITE = Command.of(Opcode.WRITE, 0x1234, 5)


@dataclass(frozen=True)
class Case:
    """CDO files of each partition, and the fields of the image."""

    partitions: Sequence[Sequence[Cdo]]
    fields: dict[str, str | int] = field(default_factory=dict)

    def pdi(self) -> Pdi:
        partitions = tuple(Partition(merge(cdos)) for cdos in self.partitions)
        return Pdi(partitions=partitions, **self.fields)  # type: ignore[arg-type]


def dma(words: int, address: int = 0x20000, high: int = 0) -> Command:
    return Command.of(Opcode.DMA_WRITE, high, address, *range(words))


def one(*commands: Command) -> Case:
    return Case([[Cdo.of(commands)]])


def any_command(rng: random.Random) -> Command:
    opcode = rng.choice([*LENGTHS, Opcode.NOP, Opcode.MARKER, *[Opcode.DMA_WRITE] * 4])
    if opcode == Opcode.DMA_WRITE:
        length = 2 + rng.choice([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 252, 253])
    elif opcode in LENGTHS:
        length = rng.choice(LENGTHS[opcode])
    else:
        length = rng.choice([1, 2, 3, 4])
    return Command.of(opcode, *(rng.getrandbits(rng.choice([0, 8, 31])) for _ in range(length)))


def any_file(rng: random.Random) -> Cdo:
    commands = [any_command(rng) for _ in range(rng.randrange(1, 8))]
    return Cdo.of([*commands, END] if rng.random() < 0.5 else commands)


def any_case(seed: int) -> Case:
    rng = random.Random(seed)
    counts = [rng.randrange(1, 4) for _ in range(rng.randrange(1, 3))]
    return Case([[any_file(rng) for _ in range(count)] for count in counts])


ENABLE = Command.of(Opcode.MASK_WRITE, 0x232000, 1, 1)
CASES = {
    "mlir-aie": Case(
        [[Cdo.of([dma(64), END]), Cdo.of([WRITE, WRITE, END]), Cdo.of([ENABLE, END])]]
    ),
    "one": one(WRITE),
    "padded": one(WRITE, Command(Opcode.NOP)),
    "long": one(dma(252), dma(253), dma(300)),
    "aligned": one(WRITE, dma(4, 0x20000), dma(4, 0x20004), dma(4, 0x20008), dma(4, 0x2000C)),
    "above-npi": one(dma(2, 0xF8000000), dma(2, 0xF6000000, high=1), dma(1, 0xF6000000)),
    "one-word": one(dma(1), dma(1, high=1), dma(0)),
    "narrowed": one(
        Command.of(Opcode.WRITE64, 0, 1, 2),
        Command.of(Opcode.MASK_WRITE64, 0, 1, 2, 3),
        Command.of(Opcode.MASK_POLL64, 0, 1, 2, 3, 4, 0),
        Command.of(Opcode.MASK_POLL64, 1, 1, 2, 3, 4, 5),
    ),
    "marker": one(Command.of(Opcode.MARKER, 1, 0x41424344, 0x45, 0x46)),
    "after-end": one(WRITE, END, ENABLE),
    "partitions": Case([[Cdo.of([WRITE])], [Cdo.of([WRITE, WRITE])], [Cdo.of([ENABLE])]]),
    "fields": Case(
        [[Cdo.of([WRITE])]],
        {"name": "abcdefghijklmnop", "id": 0x18700000, "id_code": 0x04CA8093, "extended_id": 0x3F},
    ),
    **{f"random-{seed}": any_case(seed) for seed in range(30)},
}


def bootgen(case: Case) -> bytes:
    with TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "in.bif").write_text(bif(case, folder))
        command = ["bootgen", "-arch", "versal", "-image", "in.bif", "-o", "out.pdi", "-w"]
        subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=60)
        return (folder / "out.pdi").read_bytes()


def bif(case: Case, folder: Path) -> str:
    """bootgen's description of a case whose CDO files it writes to `folder`."""
    pdi, lines = case.pdi(), []
    for i, cdos in enumerate(case.partitions):
        names = [f"p{i}_{j}.bin" for j in range(len(cdos))]
        for file, cdo in zip(names, cdos, strict=True):
            (folder / file).write_bytes(cdo.to_bytes())
        lines.append("{ type=cdo " + " ".join(f"file={file}" for file in names) + " }")
    image = f"image {{ name={pdi.name}, id={pdi.id:#x}\n" + "\n".join(lines) + "\n}"
    codes = f"id_code = {pdi.id_code:#x}\nextended_id_code = {pdi.extended_id:#x}"
    return f"all:\n{{\n{codes}\n{image}\n}}\n"


def recorded(name: str) -> bytes:
    return (GOLDEN / f"{name}.pdi").read_bytes()


@pytest.mark.parametrize("name", CASES)
def test_pdi_equals_that_of_bootgen(name: str) -> None:
    written = CASES[name].pdi().to_bytes()
    assert written == recorded(name)
    assert written == (bootgen(CASES[name]) if shutil.which("bootgen") else recorded(name))


@pytest.mark.parametrize("name", CASES)
def test_what_bootgen_wrote_is_read(name: str) -> None:
    pdi = parse_pdi(recorded(name), name)
    assert pdi == CASES[name].pdi()
    assert pdi.to_bytes() == recorded(name)


@pytest.mark.parametrize(
    ("commands", "message"),
    [
        ([], "a CDO without commands"),
        ([END, WRITE], "a CDO without commands"),
        ([WRITE, Command.of(Opcode.KEYHOLE, 1, 2, 3)], "cannot pack command KEYHOLE with 3 words"),
        ([Command.of(Opcode.WRITE, 1)], "cannot pack command WRITE with 1 words"),
        ([dma(2, 0xF6000000)], "DMA_WRITE to 0xf6000000, which is no address of an NPU"),
        ([Command.of(0x205, 1)], "cannot pack command 0x205 with 1 words"),
    ],
)
def test_commands_unknown_to_the_merge_are_refused(commands: list[Command], message: str) -> None:
    with pytest.raises(BundleError, match=message):
        merge([Cdo.of([WRITE]), Cdo.of(commands)])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "abcdefghijklmnopq"}, "ImageHeader.name: 'abcdefghijklmnopq' is too long"),
        ({"extended_id": 0x40}, "extended id 0x40 has more than 6 bits"),
        ({"id_code": 1 << 32}, "TableHeader.id_code"),
    ],
)
def test_fields_that_do_not_fit_are_refused(fields: dict[str, str | int], message: str) -> None:
    with pytest.raises(BundleError, match=message):
        Case([[Cdo.of([WRITE])]], fields).pdi().to_bytes()


ONE = CASES["one"].pdi().to_bytes()


def patched(offset: int, value: int, start: int = 0, stop: int = 0) -> bytes:
    """The PDI `one` with a word replaced, and the header from `start` to `stop` sealed again."""
    data = bytearray(ONE)
    struct.pack_into("<I", data, offset, value)
    words = struct.unpack_from(f"<{(stop - start) // 4}I", data, start)
    if stop:
        struct.pack_into("<I", data, stop, ~sum(words) & 0xFFFFFFFF)
    return bytes(data)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "f.pdi: magic at 0x0: needs 16 bytes, but 0 are left"),
        (patched(0, 0xAA), "f.pdi: magic at 0x0: not a PDI"),
        (patched(0x14, 2), "f.pdi: table checksum at 0x8c: expected 0x9ac12a77, found 0x9ac12a78"),
        (patched(0x14, 2, 0x10, 0x8C), "f.pdi: table images at 0x10: expected 0x1, found 0x2"),
        (patched(0x10, 0x50000, 0x10, 0x8C), "table version at 0x10: expected 0x40000"),
        (patched(0x18, 1 << 30, 0x10, 0x8C), "image header at 0x100000000: needs 60 bytes, but 0"),
        (patched(0x94, 2, 0x90, 0xCC), "image partitions at 0x90: expected 0x1, found 0x2"),
        (patched(0xF0, 0x50, 0xD0, 0x14C), "partition 0 data offset at 0xd0: .* found 0x140"),
        (patched(0xF4, 0x01000006, 0xD0, 0x14C), "partition 0 type at 0x150: expected 0x2, found"),
        (patched(0xD8, 0x80, 0xD0, 0x14C), "encrypted length"),
        (patched(0xD4, 7, 0xD0, 0x14C), "partition 0: length at 0x0: expected 0x20, found 0x1c"),
        (ONE[:-4], "partition 0 at 0x150: needs 32 bytes, but 28 are left"),
        (ONE + bytes(16), "f.pdi: end at 0x170: expected 0x170, found 0x180"),
    ],
)
def test_broken_pdis_are_refused(data: bytes, message: str) -> None:
    with pytest.raises(BundleError, match=message):
        parse_pdi(data, "f.pdi")


if __name__ == "__main__":
    for case_name, case in CASES.items():
        (GOLDEN / f"{case_name}.pdi").write_bytes(bootgen(case))
