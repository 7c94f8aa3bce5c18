"""Attention over all columns of the array; the programs of the cores know no length.

Prefill: each core of a column has the queries of one head, and the mem tile broadcasts blocks of
keys and values to the four. Decode: the rows are the heads of one token, the mem tile deals blocks
to the four cores, and their sums are merged upwards through shared memory. The queries say how many
blocks follow, so one compiled design serves every length; only the runtime sequence differs.
"""

from __future__ import annotations

from collections.abc import Sequence

from xdsl.dialects import arith
from xdsl.dialects.builtin import BFloat16Type, IndexType, ModuleOp, i8, i16, i32
from xdsl.ir import SSAValue

from uq.kernels.npu.build import Builder, memref
from uq.kernels.npu.dialect.attributes import Port
from uq.kernels.npu.kernels.attention.plan import LANES, Job, Plan
from uq.kernels.npu.kernels.attention.variant import OBJECT, Variant

AHEAD = 4  # tasks that wait in a channel's queue
KEYS_BD = 2  # the first of AHEAD descriptors for keys


class Kinds:
    """The memrefs of a variant."""

    def __init__(self, variant: Variant) -> None:
        rows, keys = variant.rows, variant.keys
        self.query_words = variant.queries.itemsize // 4
        self.block_bytes = variant.block.itemsize
        self.output_elements = variant.output.itemsize // 2
        self.queries = memref(self.query_words, i32)
        self.block = memref(self.block_bytes, i8)
        self.output = memref(self.output_elements, BFloat16Type())
        self.scores = memref(rows, keys, i32)
        self.weights = memref(rows, keys, i16)
        self.sums = memref(rows, variant.head_dim, i32)
        self.state = memref(2, rows, i32)


def attention(plan: Plan) -> ModuleOp:
    """The design. Host buffers: queries, blocks of keys and values, output, as `pack` has them."""
    variant, kinds = plan.variant, Kinds(plan.variant)
    design = Builder(variant.device)
    _declare(design, kinds)
    columns = range(len(plan.jobs))
    tiles = [[design.tile(column, row) for row in range(2 + LANES)] for column in columns]
    prefill = variant.form == "prefill"
    for column in columns:
        (_connect_prefill if prefill else _connect_decode)(design, kinds, column, tiles[column])
    for column in columns:
        for lane, core in enumerate(tiles[column][2:]):
            (_prefill if prefill else _decode)(design, kinds, column, lane, core)
    _sequence(design, kinds, plan)
    return design.module


def _declare(design: Builder, kinds: Kinds) -> None:
    sums, state = kinds.sums, kinds.state
    work = (kinds.queries, kinds.block, kinds.scores, kinds.weights, sums, state, i32)
    design.function("attention_start", sums, state)
    design.function("attention_block", *work)
    design.function("attention_merge", sums, state, sums, state)
    design.function("attention_finish", sums, state, kinds.output)


def _connect_prefill(design: Builder, kinds: Kinds, column: int, tiles: Sequence[SSAValue]) -> None:
    shim, mem, *cores = tiles
    queries = memref(LANES * kinds.query_words, i32)
    design.fifo(f"q_in{column}", shim, [mem], 2, queries)
    parts = [
        design.fifo(f"q{column}_{lane}", mem, [core], 1, kinds.queries)
        for lane, core in enumerate(cores)
    ]
    design.link([f"q_in{column}"], parts, [lane * kinds.query_words for lane in range(LANES)])
    design.fifo(f"kv_in{column}", shim, [mem], 2, kinds.block)
    design.fifo(f"kv{column}", mem, cores, 2, kinds.block)
    design.link([f"kv_in{column}"], [f"kv{column}"])
    rows = [
        design.fifo(f"o{column}_{lane}", core, [mem], 1, kinds.output)
        for lane, core in enumerate(cores)
    ]
    design.fifo(
        f"o_out{column}", mem, [shim], 2, memref(LANES * kinds.output_elements, BFloat16Type())
    )
    design.link(rows, [f"o_out{column}"], [n * kinds.output_elements for n in range(LANES)])


def _connect_decode(design: Builder, kinds: Kinds, column: int, tiles: Sequence[SSAValue]) -> None:
    shim, mem, *cores = tiles
    design.fifo(f"q_in{column}", shim, cores, 1, kinds.queries)
    design.fifo(f"kv_in{column}", shim, [mem], 2, memref(LANES * kinds.block_bytes, i8))
    parts = [
        design.fifo(f"kv{column}_{lane}", mem, [core], 2, kinds.block)
        for lane, core in enumerate(cores)
    ]
    design.link([f"kv_in{column}"], parts, [lane * kinds.block_bytes for lane in range(LANES)])
    for lane in range(LANES - 1):
        ends = cores[lane], [cores[lane + 1]]
        design.fifo(f"sums{column}_{lane}", *ends, 1, kinds.sums)
        design.fifo(f"state{column}_{lane}", *ends, 1, kinds.state)
    design.fifo(f"o_out{column}", cores[-1], [shim], 1, kinds.output)


def _buffers(design: Builder, kinds: Kinds, core: SSAValue, name: str) -> list[SSAValue]:
    """Scores, weights."""
    return [
        design.buffer(core, f"{what}{name}", kind)
        for what, kind in (("scores", kinds.scores), ("weights", kinds.weights))
    ]


def _own_sums(design: Builder, kinds: Kinds, core: SSAValue, name: str) -> list[SSAValue]:
    """Sums, state."""
    return [
        design.buffer(core, f"{what}{name}", kind)
        for what, kind in (("own_sums", kinds.sums), ("own_state", kinds.state))
    ]


def _prefill(design: Builder, kinds: Kinds, column: int, lane: int, core: SSAValue) -> None:
    name = f"{column}_{lane}"
    q, kv, o = f"q{name}", f"kv{column}", f"o{name}"
    work = _buffers(design, kinds, core, name)
    sums, state = _own_sums(design, kinds, core, name)
    with design.core(core, OBJECT), design.forever():
        queries = design.acquire(q, Port.Consume)
        design.call("attention_start", sums, state)
        with design.loop(_blocks(design, queries)) as turn:
            block = design.acquire(kv, Port.Consume)
            index = design.cast(turn, i32)
            design.call("attention_block", queries, block, *work, sums, state, index)
            design.release(kv, Port.Consume)
        design.release(q, Port.Consume)
        _finish(design, o, sums, state)


def _decode(design: Builder, kinds: Kinds, column: int, lane: int, core: SSAValue) -> None:
    name, below = f"{column}_{lane}", f"{column}_{lane - 1}"
    q, kv = f"q_in{column}", f"kv{name}"
    work = _buffers(design, kinds, core, name)
    last = lane == LANES - 1
    own = _own_sums(design, kinds, core, name) if last else []
    with design.core(core, OBJECT), design.forever():
        queries = design.acquire(q, Port.Consume)
        sums, state = own or [
            design.acquire(f"{what}{name}", Port.Produce) for what in ("sums", "state")
        ]
        design.call("attention_start", sums, state)
        with design.loop(_blocks(design, queries)) as turn:
            block = design.acquire(kv, Port.Consume)
            index = _every_fourth(design, turn, lane)
            design.call("attention_block", queries, block, *work, sums, state, index)
            design.release(kv, Port.Consume)
        design.release(q, Port.Consume)
        if lane:
            theirs = [design.acquire(f"{what}{below}", Port.Consume) for what in ("sums", "state")]
            design.call("attention_merge", sums, state, *theirs)
            for what in ("sums", "state"):
                design.release(f"{what}{below}", Port.Consume)
        if last:
            _finish(design, f"o_out{column}", sums, state)
        else:
            for what in ("sums", "state"):
                design.release(f"{what}{name}", Port.Produce)


def _blocks(design: Builder, queries: SSAValue) -> SSAValue:
    """The number of blocks that follow: the first word of the queries."""
    return design.cast(design.load(queries, design.constant(0)), IndexType())


def _every_fourth(design: Builder, turn: SSAValue, lane: int) -> SSAValue:
    """turn * 4 + lane, in 32 bits."""
    index = design.cast(turn, i32)
    scaled = design.emit(arith.MuliOp(index, design.constant(LANES, i32))).result
    return design.emit(arith.AddiOp(scaled, design.constant(lane, i32))).result


def _finish(design: Builder, fifo: str, sums: SSAValue, state: SSAValue) -> None:
    rows = design.acquire(fifo, Port.Produce)
    design.call("attention_finish", sums, state, rows)
    design.release(fifo, Port.Produce)


def _sequence(design: Builder, kinds: Kinds, plan: Plan) -> None:
    """All queries and outputs of a column as one task each; keys as one task for each job."""
    per_job = LANES if plan.variant.form == "prefill" else 1
    queries, output = per_job * kinds.query_words, per_job * kinds.output_elements
    counts = [len(jobs) for jobs in plan.jobs]
    starts = [sum(counts[:column]) for column in range(len(counts))]
    stored = plan.kv_heads * plan.stored * kinds.block_bytes
    arguments = (
        memref(sum(counts) * queries, i32),
        memref(stored, i8),
        memref(sum(counts) * output, BFloat16Type()),
    )
    with design.sequence(*arguments) as (q, kv, o):
        for column, (start, count) in enumerate(zip(starts, counts, strict=True)):
            size = count * output
            at = start * output
            design.transfer(f"o_out{column}", o, size, offset=at, descriptor=0, token=True)
            size, at = count * queries, start * queries
            design.transfer(f"q_in{column}", q, size, offset=at, descriptor=1, token=True)
        for turn in range(max(counts)):
            for column, jobs in enumerate(plan.jobs):
                if turn < len(jobs):
                    _stream(design, kinds, plan, kv, column, turn, jobs[turn])
        for column, count in enumerate(counts):
            for _ in range(min(count, AHEAD)):
                design.wait(f"kv_in{column}")
            design.wait(f"q_in{column}")
            design.wait(f"o_out{column}")


def _stream(
    design: Builder, kinds: Kinds, plan: Plan, kv: SSAValue, column: int, turn: int, job: Job
) -> None:
    if turn >= AHEAD:
        design.wait(f"kv_in{column}")
    design.transfer(
        f"kv_in{column}",
        kv,
        job.blocks * kinds.block_bytes,
        offset=(job.kv_head * plan.stored + job.first) * kinds.block_bytes,
        descriptor=KEYS_BD + turn % AHEAD,
        token=True,
    )
