"""Valid files with random damage: a reader answers with a value or with a UqError of one line.

`scripts/fuzz FORMAT --runs N` does the same many more times and bounds time and memory.
"""

import argparse
import random
import resource
import signal
import struct
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from uq.errors import UqError
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
DESIGN = b"""module { aie.device(npu1) {
  %s = aie.tile(0, 0)
  %c = aie.tile(0, 2)
  %b = aie.buffer(%c) {sym_name = "b"} : memref<4xi8>
  %l = aie.lock(%c, 1) {init = 0 : i32}
  aie.objectfifo @in(%s, {%c}, 2 : i32) : !aie.objectfifo<memref<8xi32>>
  aie.core(%c) {
    %i = arith.constant 1 : index
    scf.for %n = %i to %i step %i {
      %v = aie.objectfifo.acquire @in(Consume, 1) : !aie.objectfifosubview<memref<8xi32>>
      aie.objectfifo.release @in(Consume, 1)
    }
    aie.end
  } {link_with = "k.o"}
  aie.runtime_sequence(%x : memref<8xi32>) {
    aiex.npu.dma_memcpy_nd (%x[0,0,0,0][1,1,1,8][0,0,0,1]) {metadata = @in, id = 0} : memref<8xi32>
    aiex.npu.dma_wait {symbol = @in}
  }
} }"""
INTERESTING = (0, 1, 2, 4, 7, 8, 0xFF, 0x100, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)


@dataclass(frozen=True)
class Edit:
    """Damage at one place; place and value are reduced to what the file has."""

    kind: int
    place: int
    value: int


def damage(data: bytes, edits: Sequence[Edit]) -> bytes:
    damaged = bytearray(data)
    for edit in edits:
        if damaged:
            EDITS[edit.kind % len(EDITS)](damaged, edit.place % len(damaged), edit.value)
    return bytes(damaged)


def set_byte(data: bytearray, place: int, value: int) -> None:
    data[place] = value & 0xFF


def set_word(data: bytearray, place: int, value: int) -> None:
    data[place & ~3 : (place & ~3) + 4] = struct.pack("<I", value & 0xFFFFFFFF)


def set_interesting(data: bytearray, place: int, value: int) -> None:
    set_word(data, place, INTERESTING[value % len(INTERESTING)])


def add_to_word(data: bytearray, place: int, value: int) -> None:
    word = int.from_bytes(data[place & ~3 : (place & ~3) + 4], "little")
    set_word(data, place, word + value % 17 - 8)


def cut(data: bytearray, place: int, value: int) -> None:
    del data[place : place + 1 + value % 16]


def insert(data: bytearray, place: int, value: int) -> None:
    data[place:place] = bytes([value & 0xFF]) * (4 * (value >> 8 & 3) or 1)


def repeat(data: bytearray, place: int, value: int) -> None:
    data[place:place] = data[place : place + 1 + value % 64]


def truncate(data: bytearray, place: int, value: int) -> None:
    del data[place:]


EDITS = (set_byte, set_word, set_interesting, add_to_word, cut, insert, repeat, truncate)


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


@dataclass(frozen=True)
class Format:
    """Valid files, what makes a damaged one look whole again, and a reader."""

    samples: Sequence[bytes]
    mend: Callable[[bytes], bytes]
    read: Callable[[bytes], object]


FORMATS = {
    "xclbin": Format([XCLBIN], mend_xclbin, read_xclbin),
    "partition": Format([SECTIONS[Kind.AIE_PARTITION]], bytes, read_partition),
    "metadata": Format([SECTIONS[Kind.EMBEDDED_METADATA]], bytes, read_metadata),
    "pdi": Format(PDIS, mend_pdi, read_pdi),
    "cdo": Format(CDOS, mend_cdo, read_cdo),
    "txn": Format([TXN], mend_txn, read_txn),
    "raw": Format([b"AUPN" + bytes(40), b"NPUA" + bytes(90)], bytes, parse_raw_kernel),
    "mlir": Format([DESIGN], bytes, read_design),
}


def accepts(name: str, sample: int, edits: Sequence[Edit], mend: bool) -> bool:
    """Whether the damaged file is read. Any error but a UqError of one line fails."""
    form = FORMATS[name]
    data = damage(form.samples[sample % len(form.samples)], edits)
    try:
        form.read(form.mend(data) if mend else data)
    except UqError as error:
        assert "\n" not in str(error)
        return False
    return True


edit_lists = st.lists(
    st.builds(Edit, st.integers(0, 7), st.integers(0, 1 << 16), st.integers(0, 0xFFFFFFFF)),
    max_size=4,
)


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
    assert accepts(name, sample, edits, mend) or edits


@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=50, derandomize=True, database=None, deadline=None)
@given(data=st.binary(max_size=300))
def test_random_bytes_are_read_or_refused(name: str, data: bytes) -> None:
    try:
        FORMATS[name].read(data)
    except UqError as error:
        assert "\n" not in str(error)


SECONDS, MEMORY = 5, 256 << 20  # of one input; more is a hang, or growth
WATCHED = 100  # of so many inputs one is traced: its peak is at most PEAK and PER_BYTE of the file
PEAK, PER_BYTE = 1 << 20, 64


def fuzz(name: str, runs: int, seed: int) -> tuple[Counter[bool], int]:
    """How many of `runs` damaged files were read and refused, and the largest peak in bytes."""
    rng = random.Random(seed)
    results: Counter[bool] = Counter()
    peak = 0
    for run in range(runs):
        edits = [
            Edit(rng.getrandbits(3), rng.getrandbits(16), rng.getrandbits(32))
            for _ in range(rng.randrange(1, 5))
        ]
        chosen = name, rng.getrandbits(2), edits, rng.random() < 0.75
        signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
        if run % WATCHED:
            results[accepts(*chosen)] += 1
        else:
            accepted, used = traced(*chosen)
            results[accepted] += 1
            peak = max(peak, used)
    signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    return results, peak


def traced(name: str, sample: int, edits: Sequence[Edit], mend: bool) -> tuple[bool, int]:
    """Whether the file is read, and the bytes of memory at its peak."""
    samples = FORMATS[name].samples
    size = len(damage(samples[sample % len(samples)], edits))
    tracemalloc.start()
    try:
        accepted = accepts(name, sample, edits, mend)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak <= PEAK + PER_BYTE * size, f"{peak} bytes for a file of {size}"
    return accepted, peak


def too_slow(*_: object) -> None:
    raise AssertionError(f"an input took more than {SECONDS} s of processor time")


def limit_memory() -> None:
    """To what is taken now, and MEMORY more."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/fuzz", description=__doc__)
    parser.add_argument("format", choices=FORMATS)
    parser.add_argument("--runs", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    signal.signal(signal.SIGVTALRM, too_slow)
    limit_memory()
    start = time.perf_counter()
    results, peak = fuzz(args.format, args.runs, args.seed)
    seconds = time.perf_counter() - start
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    print(
        f"{args.format}: {results[True]} read, {results[False]} refused, {seconds:.0f} s; "
        f"at most {peak >> 10} KiB for an input, the process {most} MiB"
    )


if __name__ == "__main__":
    main()
