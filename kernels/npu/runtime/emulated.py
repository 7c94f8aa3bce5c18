"""The functional emulator as the machine behind pyxrt's double: `--device npu-emulator`.

The runtime does all that it does for an NPU, to the last call. In place of machine code its xclbin
carries the hash of a design; the instructions are the true ones, and choose the sequence that the
emulator interprets.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from xdsl.dialects.builtin import ModuleOp
from xdsl.rewriter import Rewriter

from uq.errors import DesignError
from uq.formats.xdna.build import KERNEL_ID, build_xclbin, npu_kernel
from uq.formats.xdna.cdo import Cdo, Command, Opcode
from uq.formats.xdna.partition import AiePartition, Group, PdiEntry
from uq.formats.xdna.pdi import Partition, Pdi
from uq.formats.xdna.txn import NPU1, NPU2, MaskWrite, Transaction
from uq.formats.xdna.xclbin import Xclbin as XclbinFile
from uq.kernels.npu.dialect.structure import SequenceOperation
from uq.kernels.npu.dialect.text import memref_type
from uq.kernels.npu.emulator import Deadlock, Kernels, run
from uq.kernels.npu.lowering import lower
from uq.kernels.npu.model import nbytes
from uq.kernels.npu.runtime.double import State, Xclbin, double
from uq.kernels.npu.runtime.npu import Npu
from uq.kernels.npu.runtime.program import EMULATOR, FIRST_BUFFER, Program, read_program
from uq.kernels.npu.source import parse_design, print_design
from uq.kernels.npu.toolchain.job import Job

BUFFERS = 5


class Emulator:
    """A machine that interprets the designs that it was given.

    Attributes:
        fault: why the last run failed.
    """

    def __init__(self, generation: str) -> None:
        self.generation = generation
        self.name = f"emulated {generation}"
        self.fault: DesignError | None = None
        self._known: dict[tuple[bytes, bytes], Design] = {}  # by xclbin and instructions

    def program(self, job: Job, folder: Path) -> Program:
        """Write what the runtime opens for a design, and remember the design.

        Args:
            folder: gets `aie.xclbin` and `insts.bin`; the former is of no use to an NPU.

        Raises:
            DesignError: the design is for the other NPU.
        """
        self.learn(job, parse_design(job.text, job.name).module)
        write_program(job, folder)
        return read_program(folder)

    def learn(self, job: Job, module: ModuleOp) -> bytes:
        """Remember a design with the objects of a job; its instructions.

        Args:
            module: the job's own, or one that differs in its sequence: both have one xclbin.

        Raises:
            DesignError: the design is for the other NPU.
        """
        family = job.device.partition("_")[0]
        if family != self.generation:
            raise DesignError(f"{job.name} is for {job.device}, not for {self.name}")
        instructions = instructions_of(job, module)
        self._known[xclbin_of(job, module).uuid, instructions] = Design(job, module)
        return instructions

    def admit(self, xclbin: Xclbin) -> None:
        if xclbin.content.uuid not in (uuid for uuid, _ in self._known):
            raise RuntimeError(f"{xclbin.path} is not of a design that this emulator was given")

    def execute(self, xclbin: Xclbin, arguments: Mapping[int, Any], timeout: int) -> State:
        """Without a clock there is no timeout: a deadlock is one, and `fault` explains it."""
        self.fault = None
        try:
            self._run(xclbin, arguments)
        except Deadlock as error:
            self.fault = error
            return State.ERT_CMD_STATE_TIMEOUT
        except DesignError as error:
            self.fault = error
            return State.ERT_CMD_STATE_ERROR
        return State.ERT_CMD_STATE_COMPLETED

    def _run(self, xclbin: Xclbin, arguments: Mapping[int, Any]) -> None:
        instructions = arguments[1][: arguments[2]].tobytes()
        design = self._known.get((xclbin.content.uuid, instructions))
        if design is None:
            raise DesignError(f"{xclbin.path.name}: these instructions are of no known sequence")
        sizes = design.buffers
        indices = range(FIRST_BUFFER, FIRST_BUFFER + len(sizes))
        if not all(index in arguments for index in indices):
            raise DesignError(f"{design.job.name} takes {len(sizes)} buffers")
        pairs = zip(indices, sizes, strict=True)
        exact = [arguments[index][:size] for index, size in pairs]
        run(design.module, exact, _kernels(design.job))


@dataclass(frozen=True)
class Design:
    job: Job
    module: ModuleOp

    @property
    def buffers(self) -> list[int]:
        """Bytes of each."""
        (sequence,) = (op for op in self.module.walk() if isinstance(op, SequenceOperation))
        return [nbytes(memref_type(argument)) for argument in sequence.body.block.args]


def emulated_npu(generation: str) -> tuple[Npu, Emulator]:
    """An NPU of the runtime, and the emulator that it is."""
    machine = Emulator(generation)
    return Npu(double([machine]), explain=lambda: machine.fault), machine


def write_program(job: Job, folder: Path) -> None:
    """The files of a program, as `uq npu build` leaves them."""
    module = parse_design(job.text, job.name).module
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "aie.xclbin").write_bytes(xclbin_of(job, module).to_bytes())
    (folder / "insts.bin").write_bytes(instructions_of(job, module))


def xclbin_of(job: Job, module: ModuleOp) -> XclbinFile:
    """Whole in its formats; configures nothing.

    The PDI holds one marker with the hash of the design, without its sequence, and its sources.
    """
    digest = hashlib.sha256(_configuration(module).encode())
    for object_ in job.objects:
        digest.update(b"".join(object_.content()))
    words = struct.unpack("<8I", digest.digest())
    marker = Cdo.of([Command.of(Opcode.MARKER, 0, *words)])
    image = Pdi(partitions=(Partition(marker),)).to_bytes()
    entry = PdiEntry(image, (Group(1, (KERNEL_ID,)),))
    partition = AiePartition(
        column_width=job.columns, start_columns=job.start_columns, pdis=(entry,)
    )
    kernel = npu_kernel(buffers=max(BUFFERS, len(job.buffers)))
    return replace(build_xclbin([kernel], partition), platform=EMULATOR)


def instructions_of(job: Job, module: ModuleOp) -> bytes:
    """The true ones; for a sequence that uq does not lower, its hash in writes of no bit."""
    try:
        return lower(module).to_bytes()
    except DesignError:
        words = struct.unpack("<8I", hashlib.sha256(job.text.encode()).digest())
        writes = tuple(MaskWrite(0, word, 0) for word in words)
        generation, columns = (NPU1, 4) if job.architecture == "aie2" else (NPU2, 8)
        nothing = Transaction(operations=writes, generation=generation, columns=columns)
        return nothing.to_bytes()


def _configuration(module: ModuleOp) -> str:
    """The design without its runtime sequence."""
    copy = module.clone()
    for op in [op for op in copy.walk() if isinstance(op, SequenceOperation)]:
        Rewriter.erase_op(op)
    return print_design(copy)


def _kernels(job: Job) -> dict[str, Kernels]:
    family = job.device.partition("_")[0]
    return {o.name: Kernels(o.source, family, o.defines) for o in job.objects}
