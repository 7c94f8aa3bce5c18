"""Which column computes what: blocks of queries and the range of keys that each of them sees."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from uq.errors import UsageError
from uq.kernels.npu.kernels.attention.variant import Variant
from uq.kernels.npu.target import COLUMNS

LANES = 4  # cores of a column
NO_WINDOW = 1 << 30


@dataclass(frozen=True)
class Lane:
    """The queries of one core: a head from a position on, or heads of one token (decode)."""

    heads: tuple[int, ...]
    position: int


@dataclass(frozen=True)
class Job:
    """Blocks of queries that share one pass over blocks of keys.

    In prefill each lane is a core's; in decode the one lane is that of all four, and each core
    takes every fourth block.
    """

    kv_head: int
    first: int
    blocks: int
    lanes: tuple[Lane, ...]


@dataclass(frozen=True)
class Plan:
    """Attention of `length` queries, from position `start` on, over all keys up to theirs.

    Attributes:
        window: keys that a query sees, itself included; None for all.
        jobs: of each column, in order.
        stored: blocks of keys of each KV head, padding included.
    """

    variant: Variant
    heads: int
    kv_heads: int
    start: int
    length: int
    window: int | None
    jobs: tuple[tuple[Job, ...], ...]
    stored: int

    @property
    def keys(self) -> int:
        return self.start + self.length


def plan(
    variant: Variant,
    heads: int,
    kv_heads: int,
    length: int,
    *,
    start: int = 0,
    window: int | None = None,
    columns: int | None = None,
) -> Plan:
    """
    Raises:
        UsageError: sizes that make no attention; decode of more than one token.
    """
    if heads < 1 or kv_heads < 1 or heads % kv_heads:
        raise UsageError(f"{heads} query heads do not share {kv_heads} KV heads evenly")
    if length < 1 or start < 0 or (window is not None and window < 1):
        raise UsageError(f"attention of {length} tokens from {start} on, window {window}")
    if variant.form == "decode" and length != 1:
        raise UsageError(f"decode takes one token, not {length}; use the prefill form")
    columns = COLUMNS[variant.device] if columns is None else columns
    sizes = (variant, heads // kv_heads, kv_heads, start, length, window or NO_WINDOW)
    make = _prefill if variant.form == "prefill" else _decode
    jobs = list(make(*sizes, columns))
    dealt = tuple(tuple(jobs[column::columns]) for column in range(min(columns, len(jobs))))
    stored = max(job.first + job.blocks for job in jobs)
    return Plan(variant, heads, kv_heads, start, length, window, dealt, stored)


def on_all_columns(made: Plan) -> Plan:
    """With an idle job for each column that has none: plans of all sizes have the same design."""
    first = made.jobs[0][0].first
    idle = Job(0, first, LANES if made.variant.form == "decode" else 1, ())
    missing = COLUMNS[made.variant.device] - len(made.jobs)
    return replace(made, jobs=made.jobs + ((idle,),) * missing)


def _prefill(
    variant: Variant,
    group: int,
    kv_heads: int,
    start: int,
    length: int,
    window: int,
    columns: int,
) -> Iterator[Job]:
    """Four lanes a job: the heads of a group side by side, then the next block of queries."""
    rows, keys = variant.rows, variant.keys
    for kv_head in range(kv_heads):
        lanes = [
            Lane((kv_head * group + head,), position)
            for position in range(start, start + length, rows)
            for head in range(group)
        ]
        for index in range(0, len(lanes), LANES):
            four = lanes[index : index + LANES]
            first = max(0, four[0].position - window + 1) // keys
            last = min(four[-1].position + rows, start + length) - 1
            yield Job(kv_head, first, last // keys + 1 - first, tuple(four))


def _decode(
    variant: Variant,
    group: int,
    kv_heads: int,
    start: int,
    length: int,
    window: int,
    columns: int,
) -> Iterator[Job]:
    """The heads of a group are the rows; the keys are cut so that no column is idle."""
    rows, keys = variant.rows, variant.keys
    first, end = max(0, start - window + 1) // keys, start // keys + 1
    lists = kv_heads * -(-group // rows)
    pieces = max(1, min(columns // lists, -(-(end - first) // LANES)))
    step = -(-(end - first) // (pieces * LANES)) * LANES  # whole turns of the four cores
    for kv_head in range(kv_heads):
        for low in range(0, group, rows):
            heads = range(kv_head * group + low, kv_head * group + min(group, low + rows))
            for block in range(first, end, step):
                blocks = min(step, -(-(end - block) // LANES) * LANES)
                yield Job(kv_head, block, blocks, (Lane(tuple(heads), start),))
