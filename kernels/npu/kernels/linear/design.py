"""INT4-weight linear: blocks of outputs dealt to all cores, inputs held while weights stream by.

Each column has a contiguous run of the weight's blocks; its mem tile gives every fourth one to a
core and joins what they compute. More tokens than a core holds are passes over the weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from xdsl.dialects.builtin import IndexType, ModuleOp, f32, i8, i32
from xdsl.ir import SSAValue

from uq.errors import UsageError
from uq.formats.layouts import LAYOUTS
from uq.formats.spec import QuantTensor, Spec
from uq.kernels.npu.build import Builder, memref
from uq.kernels.npu.dialect.attributes import Port
from uq.kernels.npu.emulator.host import Kernels
from uq.kernels.npu.target import COLUMNS, DEFAULT_STACK, LIMITS, Kind

SOURCE = Path(__file__).with_name("linear.cc")
OBJECT = "linear.o"
LAYOUT = {"npu1": "npu-aie2", "npu2": "npu-aie2p"}
CORES = 4
TOKENS = 4  # rows of one multiply
STEP = 16  # inputs of one multiply
HEADER = 16  # words
SPARE = 2048  # bytes of a core for constants and indices
AHEAD = 4  # tasks that wait in a channel's queue


@dataclass(frozen=True)
class Linear:
    """One compiled kernel: a weight (outputs, inputs) and how many tokens a core holds.

    Raises:
        UsageError: no kernel for this grid, or the core's memory is too small.
    """

    device: str
    outputs: int
    inputs: int
    spec: Spec
    rows: int = TOKENS

    def __post_init__(self) -> None:
        if self.device not in LAYOUT:
            raise UsageError(f"no linear kernel for device {self.device}; there are npu1, npu2")
        if self.spec.bits != 4 or self.spec.zero_point or self.inputs % self.spec.group:
            raise UsageError(f"no NPU kernel for {self.inputs} inputs in {self.spec}; use INT4")
        if self.rows < TOKENS or self.rows % TOKENS:
            raise UsageError(f"{self.rows} tokens in a core; use a multiple of {TOKENS}")
        if self.depth < 1:
            need = self.input.itemsize + self.weight.itemsize + self.output_bytes
            raise UsageError(
                f"{self.rows} tokens of {self.inputs} inputs take {need} bytes of a core; "
                f"it has {self._room}: take fewer tokens or cut the inputs"
            )

    @property
    def width(self) -> int:
        """Outputs of a block."""
        return LAYOUTS[LAYOUT[self.device]].row_block(self.spec)

    @property
    def quads(self) -> int:
        """Fours of blocks, one block for each core."""
        return -(-self.outputs // (self.width * CORES))

    @property
    def runs(self) -> list[range]:
        """The quads of each column."""
        columns = min(COLUMNS[self.device], self.quads)
        ends = [self.quads * column // columns for column in range(columns + 1)]
        return [range(*pair) for pair in zip(ends, ends[1:], strict=False)]

    @property
    def weight(self) -> np.dtype[np.void]:
        return LAYOUTS[LAYOUT[self.device]].block(self.inputs, self.spec)

    @property
    def input(self) -> np.dtype[np.void]:
        """`struct Inputs` of linear.cc."""
        four = [
            ("scale", "<f4", (self.inputs // self.spec.group, TOKENS)),
            ("codes", "i1", (self.inputs // STEP, TOKENS, STEP)),
        ]
        unused = ("unused", "<i4", HEADER - 1)
        return np.dtype([("blocks", "<i4"), unused, ("tokens", four, self.rows // TOKENS)])

    @property
    def output_bytes(self) -> int:
        return 4 * self.rows * self.width

    @property
    def _room(self) -> int:
        return LIMITS[Kind.CORE].memory - DEFAULT_STACK - SPARE

    @property
    def depth(self) -> int:
        """Blocks of weights in a core: two where they fit, so that one streams meanwhile."""
        left = self._room - self.input.itemsize - self.output_bytes
        return min(2, left // self.weight.itemsize)

    def kernels(self) -> dict[str, Kernels]:
        """What the cores link."""
        macros = {"ROWS": self.rows, "INPUTS": self.inputs, "GROUP": self.spec.group}
        return {OBJECT: Kernels(SOURCE, self.device, macros)}


def design(linear: Linear, passes: int = 1) -> ModuleOp:
    """The design for `passes` times `rows` tokens. Host buffers as of `pack`."""
    build = Builder(linear.device)
    x, w = memref(linear.input.itemsize // 4, i32), memref(linear.weight.itemsize, i8)
    y = memref(linear.rows, linear.width, f32)
    build.function("linear_block", x, w, y)
    columns = range(len(linear.runs))
    tiles = [[build.tile(column, row) for row in range(2 + CORES)] for column in columns]
    for column in columns:
        shim, mem, *cores = tiles[column]
        build.fifo(f"x{column}", shim, cores, 1, x)
        build.fifo(f"w_in{column}", shim, [mem], 2, memref(CORES * linear.weight.itemsize, i8))
        parts = [
            build.fifo(f"w{column}_{n}", mem, [core], linear.depth, w)
            for n, core in enumerate(cores)
        ]
        build.link([f"w_in{column}"], parts, [n * linear.weight.itemsize for n in range(CORES)])
        rows = [build.fifo(f"y{column}_{n}", core, [mem], 1, y) for n, core in enumerate(cores)]
        build.fifo(f"y_out{column}", mem, [shim], 2, memref(CORES, linear.rows, linear.width, f32))
        build.link(rows, [f"y_out{column}"], [n * linear.output_bytes // 4 for n in range(CORES)])
    for column in columns:
        for lane, core in enumerate(tiles[column][2:]):
            _program(build, column, lane, core)
    _sequence(build, linear, passes)
    return build.module


def _program(build: Builder, column: int, lane: int, core: SSAValue) -> None:
    x, w, y = f"x{column}", f"w{column}_{lane}", f"y{column}_{lane}"
    with build.core(core, OBJECT), build.forever():
        inputs = build.acquire(x, Port.Consume)
        blocks = build.cast(build.load(inputs, build.constant(0)), IndexType())
        with build.loop(blocks):
            weights, rows = build.acquire(w, Port.Consume), build.acquire(y, Port.Produce)
            build.call("linear_block", inputs, weights, rows)
            build.release(w, Port.Consume)
            build.release(y, Port.Produce)
        build.release(x, Port.Consume)


def _sequence(build: Builder, linear: Linear, passes: int) -> None:
    """Inputs and outputs of a column as one task each, its weights as one for each pass."""
    x, w = linear.input.itemsize // 4, CORES * linear.weight.itemsize
    y = CORES * linear.output_bytes // 4
    runs, quads = linear.runs, linear.quads
    kinds = (
        memref(len(runs) * passes * x, i32),
        memref(quads * w, i8),
        memref(passes * quads * y, f32),
    )
    with build.sequence(*kinds) as (inputs, weights, outputs):
        for column, run in enumerate(runs):
            at, size = run.start * passes * y, len(run) * passes * y
            build.transfer(f"y_out{column}", outputs, size, offset=at, descriptor=0, token=True)
            at, size = column * passes * x, passes * x
            build.transfer(f"x{column}", inputs, size, offset=at, descriptor=1, token=True)
        for turn in range(passes):
            for column, run in enumerate(runs):
                if turn >= AHEAD:
                    build.wait(f"w_in{column}")
                place = 2 + turn % AHEAD
                build.transfer(
                    f"w_in{column}",
                    weights,
                    len(run) * w,
                    offset=run.start * w,
                    descriptor=place,
                    token=True,
                )
        for column in range(len(runs)):
            for name in (*[f"w_in{column}"] * min(passes, AHEAD), f"x{column}", f"y_out{column}"):
                build.wait(name)


def pack_weight(linear: Linear, tensor: QuantTensor) -> NDArray[np.uint8]:
    """The blocks of a bundle's tensor, with empty ones up to a whole quad."""
    blocks = LAYOUTS[LAYOUT[linear.device]].tile(tensor)
    padded = np.zeros((linear.quads * CORES, linear.weight.itemsize), np.uint8)
    padded[: len(blocks)] = blocks
    return padded


def pack_inputs(
    linear: Linear, codes: NDArray[np.int8], scale: NDArray[np.float32]
) -> NDArray[np.void]:
    """(columns, passes) of (tokens, inputs) codes and (tokens, groups) scales."""
    passes = -(-len(codes) // linear.rows)
    packed = np.zeros((len(linear.runs), passes), linear.input)
    padding = ((0, passes * linear.rows - len(codes)), (0, 0))
    quads = passes, linear.rows // TOKENS, TOKENS
    tokens = np.pad(codes, padding).reshape(*quads, -1, STEP)
    packed["tokens"]["codes"] = tokens.swapaxes(2, 3)
    packed["tokens"]["scale"] = np.pad(scale, padding).reshape(*quads, -1).swapaxes(2, 3)
    for column, run in enumerate(linear.runs):
        packed[column]["blocks"] = len(run)
    return packed


def unpack_outputs(linear: Linear, y: NDArray[np.float32], tokens: int) -> NDArray[np.float32]:
    """(tokens, outputs) of what the array wrote."""
    passes = -(-tokens // linear.rows)
    parts, start = [], 0
    for run in linear.runs:
        size = len(run) * passes * CORES * linear.rows * linear.width
        part = y.reshape(-1)[start : start + size]
        part = part.reshape(passes, len(run) * CORES, linear.rows, linear.width)
        parts.append(part.transpose(0, 2, 1, 3).reshape(passes * linear.rows, -1))
        start += size
    whole: NDArray[np.float32] = np.concatenate(parts, axis=1)[:tokens, : linear.outputs]
    return whole
