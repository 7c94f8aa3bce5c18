"""How many objects of each FIFO a core holds along its program."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from xdsl.dialects.scf import ForOp, WhileOp
from xdsl.ir import Block, Operation

from uq.kernels.npu.dialect.attributes import Port
from uq.kernels.npu.dialect.fifo import Acquire, Release
from uq.kernels.npu.dialect.text import flat
from uq.kernels.npu.model import CoreProgram

TWICE = 8  # deeper loops are walked once: each level doubles the work
End = tuple[str, Port]
Held = Counter[End]


def surplus_releases(core: CoreProgram) -> list[tuple[Release, int]]:
    """Releases of more objects than are held there, with the number held.

    A program with jumps between blocks is not followed. An acquire of n takes what is missing
    to n. Loops are walked twice, so that the second pass meets what the first one left;
    after branches the larger number counts.
    """
    if len(core.op.body.blocks) != 1 or not core.accesses:
        return []
    found: dict[Release, int] = {}
    _walk(core.op.body.block, Counter(), found)
    return list(found.items())


def unreleased(core: CoreProgram) -> Iterator[Acquire]:
    """Acquires inside a loop, of ends that the core never releases; the first of each end."""
    released = {_end(op) for op in core.accesses if isinstance(op, Release)}
    for op in core.acquires:
        if _end(op) not in released and _in_loop(op):
            released.add(_end(op))
            yield op


def _walk(block: Block, held: Held, found: dict[Release, int], depth: int = 0) -> Held:
    for op in block.ops:
        if isinstance(op, Acquire):
            held[_end(op)] = max(held[_end(op)], op.size.value.data)
        elif isinstance(op, Release):
            if op.size.value.data > held[_end(op)]:
                found.setdefault(op, held[_end(op)])
            held[_end(op)] = max(held[_end(op)] - op.size.value.data, 0)
        elif op.regions:
            held = _walk_nested(op, held, found, depth + 1)
    return held


def _walk_nested(op: Operation, held: Held, found: dict[Release, int], depth: int) -> Held:
    """Bodies that may or may not run; a loop's body also runs after itself."""
    after = Counter(held) if not isinstance(op, ForOp) else Counter()
    for region in op.regions:
        if len(region.blocks) != 1:
            continue
        once = _walk(region.block, Counter(held), found, depth)
        if isinstance(op, ForOp | WhileOp) and depth <= TWICE:
            once = _walk(region.block, Counter(once), found, depth)
        after |= once
    return after


def _end(op: Acquire | Release) -> End:
    return flat(op.fifo), op.port.data


def _in_loop(op: Operation) -> bool:
    parent = op.parent_op()
    while parent is not None and not isinstance(parent, ForOp | WhileOp):
        parent = parent.parent_op()
    return parent is not None
