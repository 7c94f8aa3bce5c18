"""The programs of cores: each operation becomes a Python function once, then the program runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from xdsl.dialects import cf, scf
from xdsl.dialects.func import CallOp
from xdsl.dialects.memref import LoadOp, StoreOp
from xdsl.ir import Block, Operation, Region, SSAValue

from uq.errors import DesignError
from uq.kernels.npu.dialect.attributes import Action
from uq.kernels.npu.dialect.attributes import Port as FifoPort
from uq.kernels.npu.dialect.fifo import Access, Acquire, Release
from uq.kernels.npu.dialect.structure import End, UseLock
from uq.kernels.npu.dialect.text import flat
from uq.kernels.npu.emulator.arithmetic import FUNCTIONS
from uq.kernels.npu.emulator.array import Array, Ring, supplies
from uq.kernels.npu.emulator.host import Library
from uq.kernels.npu.emulator.memory import Memory
from uq.kernels.npu.emulator.scheduler import Lock, Steps
from uq.kernels.npu.model import CoreProgram
from uq.kernels.npu.syntax import called

Values = dict[SSAValue, Any]  # of one run: int, float or Memory
Step = Callable[[Values], Steps | None]  # None when it did not have to wait
BLOCKING = (Acquire, UseLock)
TERMINATORS = (End, scf.YieldOp, cf.BranchOp, cf.ConditionalBranchOp, scf.ConditionOp)


def start_cores(array: Array, kernels: Mapping[str, Library]) -> None:
    for program in array.design.cores:
        compiler = _Compiler(array, program, _linked(array, program, kernels))
        steps = compiler.region(program.op.body)
        values: Values = dict(array.buffers)
        process = array.scheduler.start(f"the core of {program.place}", steps(values))
        supplies(process, compiler.released)


def _linked(
    array: Array, program: CoreProgram, kernels: Mapping[str, Library]
) -> Mapping[str, Callable[..., None]]:
    """The functions that this core calls, by name."""
    found: dict[str, Callable[..., None]] = {}
    for name in dict.fromkeys(called(program.op)):
        function = array.design.functions[name]
        file = program.op.link_with or function.attributes.get("link_with")
        library = kernels.get(getattr(file, "data", ""))
        if library is None:
            raise DesignError(f"core {program.place} calls @{name} of {file}, which was not given")
        found[name] = library.function(name, function.function_type.inputs.data)
    return found


@dataclass(eq=False)
class _Held:
    """What a core holds of one end of a FIFO: positions count objects since the start."""

    ring: Ring
    acquire: Lock
    release: Lock
    first: int = 0
    count: int = 0


@dataclass(eq=False)
class _Compiler:
    array: Array
    program: CoreProgram
    functions: Mapping[str, Callable[..., None]]
    released: list[Lock] = field(default_factory=list)
    ends: dict[tuple[str, FifoPort], _Held] = field(default_factory=dict)

    def region(self, region: Region) -> Callable[[Values], Steps]:
        """A region with blocks that jump to each other."""
        blocks = {block: (self.steps(block), block.last_op) for block in region.blocks}

        def run(values: Values) -> Steps:
            block: Block | None = region.blocks[0]
            while block is not None:
                steps, last = blocks[block]
                yield from _run(steps, values)
                block = _jump(last, values)

        return run

    def steps(self, block: Block) -> list[Step]:
        return [self.step(op) for op in block.ops if not isinstance(op, TERMINATORS)]

    def step(self, op: Operation) -> Step:
        match op:
            case scf.ForOp():
                return self.loop(op)
            case scf.IfOp():
                return self.branch(op)
            case Acquire():
                return self.acquire(op)
            case Release():
                return self.release(op)
            case Access():
                return _access(op)
            case UseLock():
                return self.use_lock(op)
            case CallOp():
                return _call(op, self.functions[flat(op.callee)])
            case LoadOp():
                return _load(op)
            case StoreOp():
                return _store(op)
        if (compile_op := FUNCTIONS.get(type(op))) is not None:
            return compile_op(op)
        raise DesignError(f"core {self.program.place}: {op.name} is not emulated")

    def loop(self, op: scf.ForOp) -> Step:
        block, steps = op.body.block, self.steps(op.body.block)
        index, carried = block.args[0], block.args[1:]
        last = block.last_op
        assert last is not None
        bounds, initial, results, yielded = (op.lb, op.ub, op.step), op.iter_args, op.results, last
        waits = any(isinstance(inner, BLOCKING) for inner in op.walk())

        def turns(values: Values) -> Iterator[None]:
            """Sets the values of each turn, then those behind the loop."""
            state = [values[value] for value in initial]
            for count in range(*(values[bound] for bound in bounds)):
                values[index] = count
                values.update(zip(carried, state, strict=True))
                yield
                state = [values[value] for value in yielded.operands]
            values.update(zip(results, state, strict=True))

        def run_waiting(values: Values) -> Steps:
            for _ in turns(values):
                yield from _run(steps, values)

        def run(values: Values) -> None:
            for _ in turns(values):
                for step in steps:
                    step(values)

        return run_waiting if waits else run

    def branch(self, op: scf.IfOp) -> Step:
        sides = [
            (self.steps(region.block), region.block.last_op) if region.blocks else ([], None)
            for region in (op.false_region, op.true_region)
        ]

        def run(values: Values) -> Steps:
            steps, last = sides[bool(values[op.cond])]
            yield from _run(steps, values)
            if last is not None:
                values.update(zip(op.results, (values[v] for v in last.operands), strict=True))

        return run

    def end(self, op: Acquire | Release) -> _Held:
        name, port = flat(op.fifo), op.port.data
        if (name, port) not in self.ends:
            ring = self.array.rings.get((name, port, self.program.place))
            if ring is None:
                raise DesignError(f"core {self.program.place} has no {port} end of @{name}")
            (acquire, _), (release, _) = ring.turn(port is FifoPort.Produce)
            self.ends[name, port] = _Held(ring, acquire, release)
            self.released.append(release)
        return self.ends[name, port]

    def acquire(self, op: Acquire) -> Step:
        """Takes what is missing to `size` objects; the view begins at the oldest one held."""
        end, size, view = self.end(op), op.size.value.data, op.subview
        objects, depth = end.ring.objects, len(end.ring.objects)
        if size > depth:
            raise DesignError(f"{end.acquire.name}: {size} acquired of {depth}")

        def run(values: Values) -> Steps | None:
            missing = size - end.count
            if missing <= 0 or end.acquire.value >= missing:
                take(values, max(missing, 0))
                return None
            return wait(values, missing)

        def wait(values: Values, missing: int) -> Steps:
            while end.acquire.value < missing:
                yield end.acquire, missing
            take(values, missing)

        def take(values: Values, missing: int) -> None:
            end.acquire.value -= missing
            end.count += missing
            values[view] = [objects[(end.first + n) % depth] for n in range(size)]

        return run

    def release(self, op: Release) -> Step:
        end, size = self.end(op), op.size.value.data
        name = f"core {self.program.place} releases {size} of {end.release.name}"

        def run(values: Values) -> None:
            if size > end.count:
                raise DesignError(f"{name} while it holds {end.count}")
            end.first += size
            end.count -= size
            end.release.release(size)

        return run

    def use_lock(self, op: UseLock) -> Step:
        lock = self.array.locks[op.lock]
        amount = 1 if op.value is None else op.value.value.data
        if op.action.data is Action.Release:
            self.released.append(lock)
            return lambda values: lock.release(amount)
        exact = op.action.data is Action.Acquire
        return lambda values: lock.acquire(amount, exact=exact)


def _run(steps: Sequence[Step], values: Values) -> Steps:
    for step in steps:
        waiting = step(values)
        if waiting is not None:
            yield from waiting


def _jump(last: Operation | None, values: Values) -> Block | None:
    """The block that follows, with its arguments set; None at the end of the program."""
    match last:
        case cf.BranchOp():
            target, arguments = last.successor, last.arguments
        case cf.ConditionalBranchOp():
            taken = bool(values[last.cond])
            target = last.then_block if taken else last.else_block
            arguments = last.then_arguments if taken else last.else_arguments
        case _:
            return None
    values.update(zip(target.args, [values[value] for value in arguments], strict=True))
    return target


def _access(op: Access) -> Step:
    subview, index, output = op.subview, op.index.value.data, op.output

    def run(values: Values) -> None:
        values[output] = values[subview][index]

    return run


def _call(op: CallOp, function: Callable[..., None]) -> Step:
    arguments = tuple(op.arguments)

    def run(values: Values) -> None:
        function(*[values[value] for value in arguments])

    return run


def _load(op: LoadOp) -> Step:
    buffer, indices, result = op.memref, tuple(op.indices), op.res

    def run(values: Values) -> None:
        memory: Memory = values[buffer]
        values[result] = memory.values[tuple([values[i] for i in indices])].item()

    return run


def _store(op: StoreOp) -> Step:
    buffer, indices, value = op.memref, tuple(op.indices), op.value

    def run(values: Values) -> None:
        memory: Memory = values[buffer]
        memory.values[tuple([values[i] for i in indices])] = values[value]

    return run
