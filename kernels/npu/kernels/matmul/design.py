"""INT8 matmul: stripes of 256 columns of C, one core for 64 of them, dealt to the columns in turn.

The mem tile of a column broadcasts tiles of A to its four cores, gives each its tile of B, joins
their tiles of C, and re-orders A and B into the blocks of the multiply.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from xdsl.dialects.builtin import ModuleOp, i8, i32
from xdsl.ir import SSAValue

from uq.errors import UsageError
from uq.kernels.npu.build import Builder, Layout, memref
from uq.kernels.npu.dialect.attributes import Port
from uq.kernels.npu.emulator.host import Kernels
from uq.kernels.npu.target import COLUMNS

SOURCE = Path(__file__).with_name("matmul.cc")
OBJECT = "matmul.o"
TILE = 64
CORES = 4
STRIPE = CORES * TILE
BLOCK_ROWS = {"npu1": 4, "npu2": 8}  # of A in one multiply
MAX_ROWS = 64 * TILE  # a transfer repeats 64 times
AHEAD = 4  # tasks that wait in a channel's queue


@dataclass(frozen=True)
class Shape:
    """C (m, n) = A (m, k) B (k, n).

    Raises:
        UsageError: m or k is no multiple of 64, n none of 256, or m is above 4096.
    """

    m: int
    k: int
    n: int

    def __post_init__(self) -> None:
        for name, value, unit in (("m", self.m, TILE), ("k", self.k, TILE), ("n", self.n, STRIPE)):
            if value <= 0 or value % unit:
                raise UsageError(f"matmul: {name} = {value} is no multiple of {unit}; pad it")
        if self.m > MAX_ROWS:
            raise UsageError(f"matmul: m = {self.m} is above {MAX_ROWS}; split it")


def kernels(device: str) -> dict[str, Kernels]:
    """What the cores link."""
    tile = dict.fromkeys(("TILE_M", "TILE_K", "TILE_N"), TILE)
    return {OBJECT: Kernels(SOURCE, device, tile)}


def matmul(device: str, shape: Shape) -> ModuleOp:
    """The design. Host buffers: A (m, k) and B (k, n) int8, C (m, n) int32, all row-major."""
    stripes = shape.n // STRIPE
    columns = range(min(COLUMNS[device], stripes))
    design = Builder(device)
    design.function("matmul_zero", memref(TILE, TILE, i32))
    design.function("matmul_add", *[memref(TILE, TILE, kind) for kind in (i8, i8, i32)])
    tiles = [[design.tile(column, row) for row in range(2 + CORES)] for column in columns]
    for column in columns:
        _connect(design, column, tiles[column], BLOCK_ROWS[device])
    for column in columns:
        for lane, core in enumerate(tiles[column][2:]):
            _program(design, f"{column}", lane, core, shape.k // TILE)
    _sequence(design, shape, columns)
    return design.module


def _blocks(rows: int) -> Layout:
    """A row-major tile as blocks of (rows, 8), block rows first."""
    return [(TILE // rows, rows * TILE), (TILE // 8, 8), (rows, TILE), (8, 1)]


def _connect(design: Builder, column: int, tiles: Sequence[SSAValue], block_rows: int) -> None:
    shim, mem, *cores = tiles
    one, four = memref(TILE, TILE, i8), memref(CORES, TILE, TILE, i8)
    lanes = range(CORES)
    design.fifo(f"a_in{column}", shim, [mem], 2, one)
    design.fifo(f"a{column}", mem, cores, 2, one, _blocks(block_rows))
    design.link([f"a_in{column}"], [f"a{column}"])
    design.fifo(f"b_in{column}", shim, [mem], 2, four)
    parts = [
        design.fifo(f"b{column}_{lane}", mem, [cores[lane]], 2, one, _blocks(8)) for lane in lanes
    ]
    offsets = [lane * TILE * TILE for lane in lanes]
    design.link([f"b_in{column}"], parts, offsets)
    sums = [
        design.fifo(f"c{column}_{lane}", cores[lane], [mem], 1, memref(TILE, TILE, i32))
        for lane in lanes
    ]
    design.fifo(f"c_out{column}", mem, [shim], 2, memref(CORES, TILE, TILE, i32))
    design.link(sums, [f"c_out{column}"], offsets)


def _program(design: Builder, column: str, lane: int, core: SSAValue, steps: int) -> None:
    a, b, c = f"a{column}", f"b{column}_{lane}", f"c{column}_{lane}"
    with design.core(core, OBJECT), design.forever():
        sums = design.acquire(c, Port.Produce)
        design.call("matmul_zero", sums)
        with design.loop(design.constant(steps)):
            design.call(
                "matmul_add", design.acquire(a, Port.Consume), design.acquire(b, Port.Consume), sums
            )
            design.release(a, Port.Consume)
            design.release(b, Port.Consume)
        design.release(c, Port.Produce)


def _sequence(design: Builder, shape: Shape, columns: range) -> None:
    """Stripe by stripe: C and A as one task each, B as one for each block of rows."""
    m, k, n = shape.m, shape.k, shape.n
    blocks = m // TILE
    with design.sequence(memref(m * k, i8), memref(k * n, i8), memref(m * n, i32)) as (a, b, c):
        for first in range(0, n // STRIPE, len(columns)):
            round_ = [(x, first + x) for x in columns if first + x < n // STRIPE]
            for column, stripe in round_:
                tiles = [blocks, CORES, TILE, TILE], [TILE * n, TILE, n, 1]
                layout = ([0, 0, 0, stripe * STRIPE], *tiles)
                design.strided(f"c_out{column}", c, layout, descriptor=0, token=True)
                tiles = [blocks, k // TILE, TILE, TILE], [TILE * k, TILE, k, 1]
                design.strided(f"a_in{column}", a, ([0] * 4, *tiles), descriptor=1, token=True)
            for turn in range(blocks):
                for column, stripe in round_:
                    if turn >= AHEAD:
                        design.wait(f"b_in{column}")
                    tiles = [k // TILE, CORES, TILE, TILE], [TILE * n, TILE, n, 1]
                    layout = ([0, 0, 0, stripe * STRIPE], *tiles)
                    place = 2 + turn % AHEAD
                    design.strided(f"b_in{column}", b, layout, descriptor=place, token=True)
            for column, _ in round_:
                for name in (*[f"b_in{column}"] * min(blocks, AHEAD), f"a_in{column}"):
                    design.wait(name)
                design.wait(f"c_out{column}")
