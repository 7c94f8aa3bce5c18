"""INT4-weight linear: blocks of outputs dealt to all cores, weights streaming by.

Each column has a contiguous run of the weight's blocks; its mem tile gives every fourth one to a
core and joins what they compute. The inputs of some tokens are broadcast to the cores and stay
there, or, in slices, come again for each four blocks. More tokens than a core holds are passes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from xdsl.dialects.builtin import IndexType, ModuleOp, f32, i8, i32
from xdsl.ir import SSAValue

from uq.kernels.npu.build import Builder, memref
from uq.kernels.npu.dialect.attributes import Port
from uq.kernels.npu.kernels.linear.variant import CORES, OBJECT, Linear
from uq.kernels.npu.target import MAX_ITERATIONS

AHEAD = 4  # tasks that wait in a channel's queue
INPUTS_BD, WEIGHTS_BD = 1, 1 + AHEAD  # the first of AHEAD descriptors each


class Turn(NamedTuple):
    """What one task of a column streams: some quads of the weight, for the tokens of one pass."""

    step: int  # the pass
    quads: range


def design(linear: Linear, passes: int = 1) -> ModuleOp:
    """The design for `passes` times `rows` tokens. Host buffers as of `pack`."""
    build = Builder(linear.device)
    x, w = memref(linear.input.itemsize // 4, i32), memref(linear.weight.itemsize, i8)
    y = memref(linear.rows, linear.width, f32)
    build.function("linear_block", x, w, y, i32)
    columns = range(len(linear.runs))
    tiles = [[build.tile(column, row) for row in range(2 + CORES)] for column in columns]
    for column in columns:
        shim, mem, *cores = tiles[column]
        build.fifo(f"x{column}", shim, cores, 1 if linear.resident else 2, x)
        build.fifo(f"w_in{column}", shim, [mem], 2, memref(CORES * linear.weight.itemsize, i8))
        parts = [
            build.fifo(f"w{column}_{n}", mem, [core], linear.depth, w)
            for n, core in enumerate(cores)
        ]
        build.link([f"w_in{column}"], parts, [n * linear.weight.itemsize for n in range(CORES)])
        rows = [build.fifo(f"y{column}_{n}", core, [mem], 1, y) for n, core in enumerate(cores)]
        build.fifo(f"y_out{column}", mem, [shim], 2, memref(CORES, linear.rows, linear.width, f32))
        build.link(rows, [f"y_out{column}"], [n * linear.output_bytes // 4 for n in range(CORES)])
    program = _resident if linear.resident else _sliced
    for column in columns:
        for lane, core in enumerate(tiles[column][2:]):
            program(build, linear, column, lane, core)
    _sequence(build, linear, passes)
    return build.module


def _resident(build: Builder, linear: Linear, column: int, lane: int, core: SSAValue) -> None:
    """The inputs say how many blocks they meet."""
    x, w, y = f"x{column}", f"w{column}_{lane}", f"y{column}_{lane}"
    with build.core(core, OBJECT), build.forever():
        inputs = build.acquire(x, Port.Consume)
        blocks = build.cast(build.load(inputs, build.constant(0)), IndexType())
        with build.loop(blocks):
            weights, rows = build.acquire(w, Port.Consume), build.acquire(y, Port.Produce)
            build.call("linear_block", inputs, weights, rows, build.constant(0, i32))
            build.release(w, Port.Consume)
            build.release(y, Port.Produce)
        build.release(x, Port.Consume)


def _sliced(build: Builder, linear: Linear, column: int, lane: int, core: SSAValue) -> None:
    """The sums of a block stay in its output while slices pass."""
    x, w, y = f"x{column}", f"w{column}_{lane}", f"y{column}_{lane}"
    with build.core(core, OBJECT), build.forever():
        rows = build.acquire(y, Port.Produce)
        with build.loop(build.constant(linear.slices)) as turn:
            inputs, weights = build.acquire(x, Port.Consume), build.acquire(w, Port.Consume)
            build.call("linear_block", inputs, weights, rows, build.cast(turn, i32))
            build.release(x, Port.Consume)
            build.release(w, Port.Consume)
        build.release(y, Port.Produce)


def _turns(linear: Linear, run: range, passes: int) -> Iterator[Turn]:
    """A task repeats its inputs up to 64 times; inputs that stay need no repeats."""
    most = len(run) if linear.resident else MAX_ITERATIONS
    for step in range(passes):
        for start in range(run.start, run.stop, most):
            yield Turn(step, range(start, min(start + most, run.stop)))


def _sequence(build: Builder, linear: Linear, passes: int) -> None:
    """Outputs of a column as one task; inputs and weights as one task each for every turn."""
    x = linear.slices * linear.input.itemsize // 4
    w = linear.slices * CORES * linear.weight.itemsize
    y = CORES * linear.output_bytes // 4
    runs, quads = linear.runs, linear.quads
    kinds = (
        memref(len(runs) * passes * x, i32),
        memref(quads * w, i8),
        memref(passes * quads * y, f32),
    )
    turns = [list(_turns(linear, run, passes)) for run in runs]
    with build.sequence(*kinds) as (inputs, weights, outputs):
        for column, run in enumerate(runs):
            at, size = run.start * passes * y, len(run) * passes * y
            build.transfer(f"y_out{column}", outputs, size, offset=at, descriptor=0, token=True)
        for index in range(max(map(len, turns))):
            for column, ours in enumerate(turns):
                if index >= len(ours):
                    continue
                names = f"x{column}", f"w_in{column}"
                for name in names if index >= AHEAD else ():
                    build.wait(name)
                turn, place = ours[index], index % AHEAD
                repeats = 1 if linear.resident else len(turn.quads)
                at = (column * passes + turn.step) * x
                layout = ([0, 0, 0, at], [repeats, 1, 1, x], [0, 0, 0, 1])
                build.strided(names[0], inputs, layout, descriptor=INPUTS_BD + place, token=True)
                build.transfer(
                    names[1],
                    weights,
                    len(turn.quads) * w,
                    offset=turn.quads.start * w,
                    descriptor=WEIGHTS_BD + place,
                    token=True,
                )
        for column, ours in enumerate(turns):
            for _ in range(min(len(ours), AHEAD)):
                build.wait(f"x{column}")
                build.wait(f"w_in{column}")
            build.wait(f"y_out{column}")
