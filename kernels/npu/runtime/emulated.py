"""The functional emulator as the machine behind pyxrt's double: `--device npu-emulator`.

The runtime does all that it does for an NPU, to the last call. In place of machine code its xclbin
carries the hash of a design, and the emulator interprets that design.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from uq.errors import DesignError
from uq.formats.xdna.build import KERNEL_ID, build_xclbin, npu_kernel
from uq.formats.xdna.cdo import Cdo, Command, Opcode
from uq.formats.xdna.partition import AiePartition, Group, PdiEntry
from uq.formats.xdna.pdi import Partition, Pdi
from uq.formats.xdna.txn import NPU1, NPU2, Transaction
from uq.kernels.npu.emulator import Deadlock, Kernels, run
from uq.kernels.npu.runtime.double import State, Xclbin, double
from uq.kernels.npu.runtime.npu import Npu
from uq.kernels.npu.runtime.program import EMULATOR, FIRST_BUFFER, Program, read_program
from uq.kernels.npu.source import parse_design
from uq.kernels.npu.toolchain.job import Job

BUFFERS = 5


class Emulator:
    """A machine that interprets the designs that it was given."""

    def __init__(self, generation: str) -> None:
        self.generation = generation
        self.name = f"emulated {generation}"
        self.fault: DesignError | None = None
        self._designs: dict[bytes, Job] = {}

    def program(self, job: Job, folder: Path) -> Program:
        """Write what the runtime opens for a design, and remember the design.

        Args:
            folder: gets `aie.xclbin` and `insts.bin`; neither is of use to an NPU.

        Raises:
            DesignError: the design is for the other NPU.
        """
        family = job.device.partition("_")[0]
        if family != self.generation:
            raise DesignError(f"{job.name} is for {job.device}, not for {self.name}")
        uuid = write_program(job, folder)
        self._designs[uuid] = job
        return read_program(folder)

    def admit(self, xclbin: Xclbin) -> None:
        if xclbin.content.uuid not in self._designs:
            raise RuntimeError(f"{xclbin.path} is not of a design that this emulator was given")

    def execute(self, xclbin: Xclbin, arguments: Mapping[int, Any], timeout: int) -> State:
        """Without a clock there is no timeout: a deadlock is one, and `fault` explains it."""
        job = self._designs[xclbin.content.uuid]
        self.fault = None
        indices = range(FIRST_BUFFER, FIRST_BUFFER + len(job.buffers))
        if not all(index in arguments for index in indices):
            self.fault = DesignError(f"{job.name} takes {len(job.buffers)} buffers")
            return State.ERT_CMD_STATE_ERROR
        pairs = zip(indices, job.buffers, strict=True)
        try:
            exact = [arguments[index][:size] for index, size in pairs]
            run(parse_design(job.text, job.name).module, exact, _kernels(job))
        except Deadlock as error:
            self.fault = error
            return State.ERT_CMD_STATE_TIMEOUT
        except DesignError as error:
            self.fault = error
            return State.ERT_CMD_STATE_ERROR
        return State.ERT_CMD_STATE_COMPLETED


def emulated_npu(generation: str) -> tuple[Npu, Emulator]:
    """An NPU of the runtime, and the emulator that it is."""
    machine = Emulator(generation)
    return Npu(double([machine])), machine


def write_program(job: Job, folder: Path) -> bytes:
    """Files that are whole in their formats and configure nothing; the UUID of the xclbin.

    The PDI holds one marker with the hash of the design and its sources.
    """
    digest = hashlib.sha256(job.text.encode())
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
    made = replace(build_xclbin([kernel], partition), platform=EMULATOR)
    generation, columns = (NPU1, 4) if job.architecture == "aie2" else (NPU2, 8)
    nothing = Transaction(operations=(), generation=generation, columns=columns)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "aie.xclbin").write_bytes(made.to_bytes())
    (folder / "insts.bin").write_bytes(nothing.to_bytes())
    return made.uuid


def _kernels(job: Job) -> dict[str, Kernels]:
    family = job.device.partition("_")[0]
    return {o.name: Kernels(o.source, family, o.defines) for o in job.objects}
