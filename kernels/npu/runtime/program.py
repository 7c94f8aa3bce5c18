"""What an NPU runs: an xclbin, the instructions of one run, and what its kernel takes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from uq.errors import BundleError
from uq.formats.xdna.metadata import GLOBAL, Argument, Kernel, parse_metadata
from uq.formats.xdna.raw_kernel import is_raw_kernel
from uq.formats.xdna.txn import NPU1, NPU2, parse_txn
from uq.formats.xdna.xclbin import Kind, parse_xclbin

EMULATOR = "uq emulator"  # the platform of an xclbin that no NPU can run
GENERATIONS = {NPU1: "npu1", NPU2: "npu2"}
FIRST_BUFFER = 3  # behind opcode, instructions and their size


@dataclass(frozen=True)
class Program:
    """A program of one kernel.

    Attributes:
        instructions: the TXN stream of one run.
        generation: npu1 or npu2, from the head of that stream.
        emulated: made for the emulator; it configures nothing.
    """

    xclbin: Path
    kernel: Kernel
    instructions: bytes
    generation: str
    emulated: bool

    @property
    def buffers(self) -> tuple[Argument, ...]:
        """The buffers that a run may be given."""
        return tuple(a for a in self.kernel.arguments[FIRST_BUFFER:] if a.qualifier == GLOBAL)


def read_program(folder: Path, *, kernel: str | None = None) -> Program:
    """A folder written by `uq npu build`.

    Args:
        kernel: its name, when the xclbin has several.

    Raises:
        BundleError: files are missing or broken, or there is no such kernel.
    """
    xclbin, insts = folder / "aie.xclbin", folder / "insts.bin"
    for path in (xclbin, insts):
        if not path.is_file():
            raise BundleError(f"{path}: is missing; make it with: uq npu build DESIGN -o {folder}")
    instructions = insts.read_bytes()
    stream = parse_txn(instructions, str(insts))
    if stream.generation not in GENERATIONS:
        raise BundleError(f"{insts}: made for device generation {stream.generation}, not an NPU")
    data = xclbin.read_bytes()
    refuse_raw_kernel(data, xclbin)
    parsed = parse_xclbin(data, str(xclbin))
    metadata = parsed.find(Kind.EMBEDDED_METADATA)
    if metadata is None:
        raise BundleError(f"{xclbin}: has no EMBEDDED_METADATA, so no kernel to run")
    return Program(
        xclbin=xclbin,
        kernel=_choose(parse_metadata(metadata.data, str(xclbin)), kernel, xclbin),
        instructions=instructions,
        generation=GENERATIONS[stream.generation],
        emulated=parsed.platform == EMULATOR,
    )


def refuse_raw_kernel(data: bytes, path: Path) -> None:
    """Raises BundleError: it is one."""
    if is_raw_kernel(data):
        why = "says nothing of buffers or contexts, and is shown by uq inspect only"
        raise BundleError(f"{path}: a raw kernel (magic 0x4e505541) {why}; build an xclbin")


def buffers_of(folder: Path) -> tuple[int, ...]:
    """Bytes of the buffers that the design takes, from `build.json`.

    Raises:
        BundleError: there is no such record, or it is broken.
    """
    record = folder / "build.json"
    try:
        sizes = tuple(json.loads(record.read_text())["buffers"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BundleError(f"{record}: is no record of uq npu build; build it again") from error
    if not all(type(size) is int and 0 < size < 1 << 32 for size in sizes):
        raise BundleError(f"{record}: buffers are {sizes}; build it again")
    return sizes


def _choose(kernels: tuple[Kernel, ...], name: str | None, xclbin: Path) -> Kernel:
    found = [kernel for kernel in kernels if name in (None, kernel.name)]
    if len(found) != 1:
        names = ", ".join(kernel.name for kernel in kernels) or "none"
        raise BundleError(f"{xclbin}: no single kernel {name or ''}; there are {names}")
    return found[0]
