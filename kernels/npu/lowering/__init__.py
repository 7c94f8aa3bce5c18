"""A runtime sequence into instruction words: what `aie-translate --aie-npu-to-binary` writes.

The passes in front of it are modelled too: channels of FIFOs, ids of descriptors, tasks. Buffers
that the sequence writes need an address in the text, as only the allocator of mlir-aie knows it.
"""

from __future__ import annotations

from xdsl.dialects.builtin import ModuleOp
from xdsl.ir import Operation

from uq.errors import DesignError
from uq.formats.xdna.txn import NPU1, NPU2, Transaction
from uq.kernels.npu.dialect.structure import Device, SequenceOperation
from uq.kernels.npu.lowering.commands import Commands
from uq.kernels.npu.model import Design, gather
from uq.kernels.npu.source import Source
from uq.kernels.npu.target import COLUMNS, Target


def lower(
    module: ModuleOp,
    like: Transaction | None = None,
    *,
    sequence: str | None = None,
    source: Source | None = None,
) -> Transaction:
    """The instruction stream of a runtime sequence.

    Args:
        like: of another sequence of the same design, compiled. A toolchain that gives the tiles
            controller ids writes them in front of each task with a token; they are taken over.
        sequence: its name; not needed where there is one only.
        source: what was read; names the lines of faults.

    Raises:
        DesignError: no such sequence, or an operation, or a form of one, that has no words.
    """
    design = _design(module)
    commands = Commands(design, _sequence(design, sequence), like)
    operations = []
    for op in commands.program.body.block.ops:
        try:
            operations += commands.of(op)
        except DesignError as error:
            raise DesignError(f"{_place(source, op)}{error}") from None
    generation = NPU2 if design.target.name.startswith("npu2") else NPU1
    return Transaction(
        operations=tuple(operations), generation=generation, columns=design.target.columns
    )


def _place(source: Source | None, op: Operation) -> str:
    return f"{source.name}:{source.lines[op]}: " if source and op in source.lines else ""


def _design(module: ModuleOp) -> Design:
    devices = [op for op in module.walk() if isinstance(op, Device)]
    if len(devices) != 1 or devices[0].device.data not in COLUMNS:
        raise DesignError("instructions are made for one aie.device that is an NPU")
    name = devices[0].device.data
    return gather(devices[0], Target(name, COLUMNS[name]))


def _sequence(design: Design, name: str | None) -> SequenceOperation:
    named = {op.sym_name.data if op.sym_name else "sequence": op for op in design.sequences}
    if name is None and len(named) == 1:
        return next(iter(named.values()))
    if name is None or name not in named:
        wanted = f"no runtime sequence @{name}" if name else f"{len(named)} runtime sequences"
        raise DesignError(f"{wanted}; the design has {', '.join(named) or 'none'}")
    return named[name]
