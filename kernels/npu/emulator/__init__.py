"""A functional emulator of NPU designs: the same IR that is compiled, run on this machine.

It moves bytes exactly as the design says (DMA tasks, descriptors, locks, object FIFOs, streams) and
runs the programs of the cores. It has no clock: what it shows is results and deadlocks, never time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from xdsl.dialects.builtin import ModuleOp

from uq.errors import DesignError
from uq.kernels.npu.dialect.structure import Device, SequenceOperation
from uq.kernels.npu.dialect.text import memref_type
from uq.kernels.npu.emulator.array import Array
from uq.kernels.npu.emulator.core import start_cores
from uq.kernels.npu.emulator.fifos import start_fifos
from uq.kernels.npu.emulator.host import Kernels, Library
from uq.kernels.npu.emulator.lowlevel import start_channels
from uq.kernels.npu.emulator.scheduler import Deadlock
from uq.kernels.npu.emulator.sequence import run_sequence
from uq.kernels.npu.model import Design, gather, nbytes
from uq.kernels.npu.target import COLUMNS, Target

__all__ = ["Deadlock", "Kernels", "Library", "run"]


def run(
    module: ModuleOp,
    arguments: Sequence[NDArray[np.generic]],
    kernels: Mapping[str, Library] | None = None,
    *,
    sequence: str | None = None,
) -> None:
    """Run the runtime sequence of a design to its end.

    Args:
        module: a design with one device; give only what `verify` accepts.
        arguments: the buffers of the host, one for each argument of the sequence, C-contiguous and
            of as many bytes as its memref; any dtype. Outputs are written in place.
        kernels: by the name of an object file (`link_with`), what the cores call.
        sequence: its name, when the device has several.

    Raises:
        Deadlock: nothing can move and the sequence is not at its end; says who waits for what.
        DesignError: the design uses what is not emulated, or does what would be an error on the
            array: a task for a full queue, a lock above 63, memory that is not there.
    """
    design = _design(module)
    program = _sequence(design, sequence)
    kinds = [memref_type(argument) for argument in program.body.block.args]
    if len(arguments) != len(kinds):
        raise DesignError(f"the sequence takes {len(kinds)} buffers; {len(arguments)} given")
    for index, (argument, kind) in enumerate(zip(arguments, kinds, strict=True)):
        if argument.nbytes != nbytes(kind) or not argument.flags.c_contiguous:
            raise DesignError(
                f"buffer {index} has {argument.nbytes} bytes; the sequence takes {kind}, "
                f"{nbytes(kind)} contiguous bytes"
            )
    array = Array(design)
    start_fifos(array)
    start_channels(array)
    start_cores(array, kernels or {})
    buffers = [argument.reshape(-1).view(np.uint8) for argument in arguments]
    array.scheduler.run("the runtime sequence", run_sequence(array, program, buffers))


def _design(module: ModuleOp) -> Design:
    devices = [op for op in module.walk() if isinstance(op, Device)]
    if len(devices) != 1:
        raise DesignError(f"the emulator takes one aie.device; there are {len(devices)}")
    name = devices[0].device.data
    if name not in COLUMNS:
        raise DesignError(f"{name} is not an NPU; use {', '.join(COLUMNS)}")
    return gather(devices[0], Target(name, COLUMNS[name]))


def _sequence(design: Design, name: str | None) -> SequenceOperation:
    found = [
        op
        for op in design.sequences
        if name is None or (op.sym_name is not None and op.sym_name.data == name)
    ]
    if len(found) != 1:
        raise DesignError(f"there are {len(found)} runtime sequences to run; one is needed")
    return found[0]
