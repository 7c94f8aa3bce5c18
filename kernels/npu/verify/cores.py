"""Rules for the programs of cores: object FIFOs, buffers, locks and kernels that they use."""

from __future__ import annotations

from collections.abc import Iterator

from xdsl.dialects.arith import ConstantOp
from xdsl.dialects.func import CallOp
from xdsl.dialects.scf import ForOp, IfOp, IndexSwitchOp, WhileOp
from xdsl.ir import Operation

from uq.kernels.npu.dialect.attributes import Port, SubviewType
from uq.kernels.npu.dialect.fifo import Access, Acquire
from uq.kernels.npu.dialect.structure import Buffer, Core, Lock, UseLock
from uq.kernels.npu.dialect.text import flat
from uq.kernels.npu.model import CoreProgram, Design, place_of
from uq.kernels.npu.resources import lowered_depth
from uq.kernels.npu.verify.held import surplus_releases, unreleased
from uq.kernels.npu.verify.rule import (
    AIE_VERIFIER,
    FIFO_PASS,
    SILENT,
    TARGET_MODEL,
    Problem,
    rule,
    rules_in,
)

CONDITIONS = (IfOp, IndexSwitchOp)


@rule("fifo.symbol", "Acquires and releases name an object FIFO of the device.", AIE_VERIFIER)
def fifo_symbol(design: Design) -> Iterator[Problem]:
    for core in design.cores:
        for op in core.accesses:
            if flat(op.fifo) not in design.fifos:
                yield Problem(op, f"@{flat(op.fifo)} is not an object FIFO of this device")


@rule("fifo.end", "Only the producer fills a FIFO and only its consumers empty it.", AIE_VERIFIER)
def fifo_end(design: Design) -> Iterator[Problem]:
    for core in design.cores:
        for op in core.accesses:
            fifo = design.fifos.get(flat(op.fifo))
            if fifo is None or core.place is None:
                continue
            produce = op.port.data is Port.Produce
            ends = (fifo.producer,) if produce else fifo.consumers
            if core.place not in ends:
                what = "producer" if produce else "consumer"
                yield Problem(op, f"core {core.place} is not a {what} of @{fifo.name}")


@rule("fifo.element-type", "A core sees objects as the FIFO declares them.", AIE_VERIFIER)
def fifo_element_type(design: Design) -> Iterator[Problem]:
    for core in design.cores:
        for op in core.acquires:
            fifo = design.fifos.get(flat(op.fifo))
            if fifo and op.subview.type.element != fifo.element:
                text = f"@{fifo.name} holds {fifo.element}"
                yield Problem(op, f"{text}; acquired as {op.subview.type.element}")
    for access in design.ops(Access):
        subview = access.subview.type
        if isinstance(subview, SubviewType) and access.output.type != subview.element:
            text = f"an object of {subview.element}"
            yield Problem(access, f"{text} accessed as {access.output.type}")


@rule(
    "fifo.count",
    "An acquire or release takes 1 object or more, and no more than fit.",
    AIE_VERIFIER,
)
def fifo_count(design: Design) -> Iterator[Problem]:
    for core in design.cores:
        for op in core.accesses:
            count, fifo = op.size.value.data, design.fifos.get(flat(op.fifo))
            fixed = fifo is not None and len(fifo.depths) > 1
            if count < 1:
                yield Problem(op, f"{count} objects of @{flat(op.fifo)}")
            elif fifo is not None and fixed and count > fifo.end_depth(core.place):
                text = f"{count} objects of @{fifo.name}"
                yield Problem(op, f"{text}; this end has {fifo.end_depth(core.place)}")


@rule("fifo.index", "An object is accessed by an index below the number acquired.", AIE_VERIFIER)
def fifo_index(design: Design) -> Iterator[Problem]:
    for access in design.ops(Access):
        acquire, index = access.subview.owner, access.index.value.data
        if isinstance(acquire, Acquire) and not 0 <= index < acquire.size.value.data:
            yield Problem(access, f"object {index} of {acquire.size.value.data} acquired")


@rule("fifo.release", "A core releases no more objects than it holds.", FIFO_PASS)
def fifo_release(design: Design) -> Iterator[Problem]:
    for core in design.cores:
        for op, held in surplus_releases(core):
            text = f"releases {op.size.value.data} of @{flat(op.fifo)}"
            yield Problem(op, f"{text} while it holds {held}")


@rule(
    "fifo.unreleased",
    "Objects acquired in a loop are released.",
    SILENT,
    severity="warning",
)
def fifo_unreleased(design: Design) -> Iterator[Problem]:
    for core in design.cores:
        for op in unreleased(core):
            yield Problem(op, f"@{flat(op.fifo)} is acquired in a loop and never released")


@rule("fifo.conditional", "With static lowering no acquire stands under a condition.", SILENT)
def fifo_conditional(design: Design) -> Iterator[Problem]:
    for core, op in _static_acquires(design):
        conditional = any(isinstance(parent, CONDITIONS) for parent in _parents(op, core.op))
        if conditional and _rotates(design, core, op):
            text = f"@{flat(op.fifo)} is acquired under a condition"
            yield Problem(op, f"{text}; set dynamic_objfifo_lowering = true on the core")


@rule("fifo.loop-bound", "With static lowering loops that acquire have constant bounds.", FIFO_PASS)
def fifo_loop_bound(design: Design) -> Iterator[Problem]:
    for core, op in _static_acquires(design):
        for parent in _parents(op, core.op):
            endless = isinstance(parent, WhileOp) and _rotates(design, core, op)
            if endless or (isinstance(parent, ForOp) and not _constant(parent)):
                text = f"@{flat(op.fifo)} is acquired in a loop whose bounds are not constant"
                yield Problem(op, f"{text}; set dynamic_objfifo_lowering = true on the core")
                break


def _rotates(design: Design, core: CoreProgram, op: Acquire) -> bool:
    """Whether this end has several objects, so that passes of a loop take different ones."""
    fifo = design.fifos.get(flat(op.fifo))
    return fifo is None or lowered_depth(design, fifo, core.place) > 1


@rule("buffer.reach", "A core uses memory of its own and of its neighbours.", TARGET_MODEL)
def buffer_reach(design: Design) -> Iterator[Problem]:
    for core in design.cores:
        for op in core.op.walk():
            for value in op.operands:
                if not isinstance(value.owner, Buffer) or core.place is None:
                    continue
                memory = place_of(value.owner.tile)
                if memory and not design.target.reaches(core.place, memory):
                    yield Problem(op, f"core {core.place} does not reach a buffer of tile {memory}")


@rule("lock.reach", "A core uses locks of its own and of its neighbours.", TARGET_MODEL)
def lock_reach(design: Design) -> Iterator[Problem]:
    for core in design.cores:
        for op in core.op.walk():
            if not isinstance(op, UseLock) or not isinstance(op.lock.owner, Lock):
                continue
            where = place_of(op.lock.owner.tile)
            if core.place and where and not design.target.reaches(core.place, where):
                yield Problem(op, f"core {core.place} does not reach a lock of tile {where}")


@rule("kernel.declared", "A kernel that is called is declared in the device.", AIE_VERIFIER)
def kernel_declared(design: Design) -> Iterator[Problem]:
    for call in design.ops(CallOp):
        if flat(call.callee) not in design.functions:
            yield Problem(call, f"@{flat(call.callee)} is not declared in this device")


@rule("kernel.types", "A call passes and takes the types that its kernel declares.", AIE_VERIFIER)
def kernel_types(design: Design) -> Iterator[Problem]:
    for call in design.ops(CallOp):
        if (function := design.functions.get(flat(call.callee))) is None:
            continue
        for what, given, wanted in (
            ("arguments", call.operand_types, function.function_type.inputs.data),
            ("results", call.result_types, function.function_type.outputs.data),
        ):
            if tuple(given) != tuple(wanted):
                types = [", ".join(map(str, side)) or "none" for side in (given, wanted)]
                name = function.sym_name.data
                yield Problem(call, f"@{name}: {what} {types[0]}; it declares {types[1]}")


@rule(
    "kernel.object",
    "A kernel without a body comes from an object file (link_with).",
    "mlir-aie aiecc",
    severity="warning",
)
def kernel_object(design: Design) -> Iterator[Problem]:
    for call in design.ops(CallOp):
        function = design.functions.get(flat(call.callee))
        core = next((op for op in _parents(call, design.device) if isinstance(op, Core)), None)
        if function is None or core is None or not function.is_declaration:
            continue
        if core.link_with is None and "link_with" not in function.attributes:
            text = f"@{function.sym_name.data} has no object file"
            yield Problem(call, f"{text}; name it with link_with")


def _static_acquires(design: Design) -> Iterator[tuple[CoreProgram, Acquire]]:
    for core in design.cores:
        if not core.dynamic:
            yield from ((core, op) for op in core.acquires)


def _parents(op: Operation, top: Operation) -> Iterator[Operation]:
    parent = op.parent_op()
    while parent is not None and parent is not top:
        yield parent
        parent = parent.parent_op()


def _constant(loop: ForOp) -> bool:
    return all(isinstance(bound.owner, ConstantOp) for bound in (loop.lb, loop.ub, loop.step))


RULES = rules_in(globals().values())
