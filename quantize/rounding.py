"""Tensors that need no statistics: read, rounded and handed on in pieces of rows.

Threads work ahead of the writer, over the borders of tensors and shards. The pieces do not depend
on their number, so neither do the bytes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from uq.formats.checkpoint import Checkpoint
from uq.formats.layouts import LAYOUTS
from uq.formats.spec import QuantTensor
from uq.formats.writer import QuantEntry
from uq.quantize.plan import Plan, TensorPlan
from uq.quantize.recover import misfit, recover
from uq.quantize.scales import checked, error_ratio, quantize_rtn, squared_error

PIECE = 1 << 20  # weights
PIECES_AHEAD = 48  # enough to hide the pauses of the disk

Task = TypeVar("Task")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Rows:
    """Rows `start:stop` of a tensor."""

    name: str
    start: int
    stop: int


@dataclass(frozen=True)
class RoundedRows:
    """A piece of a quantized tensor.

    Attributes:
        sums: the two of `squared_error`, groups that were quantized as planned, groups.
    """

    tensor: QuantTensor
    sums: NDArray[np.float64]


class RoundedTensors:
    """Bundle entries of the named tensors; they must be written in this order."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        plan: Plan,
        names: Sequence[str],
        pool: ThreadPoolExecutor,
        started: Callable[[str], None],
    ) -> None:
        """`started` is called with a tensor's name before its first piece is written."""
        self._checkpoint = checkpoint
        self._plan = plan
        self._started = started
        tasks = (rows for name in names for rows in self._split(name))
        self._pieces = ahead(pool, self._round, tasks, PIECES_AHEAD)

    def entry(self, name: str) -> QuantEntry:
        """The tensor as an entry whose blocks arrive while it is written."""
        tensor, sums = self._plan.tensors[name], np.zeros(4)

        def blocks() -> Iterator[QuantTensor]:
            self._started(name)
            for _ in self._split(name):
                piece = next(self._pieces)
                np.add(sums, piece.sums, out=sums)
                yield piece.tensor

        shape = self._shape(name)
        return QuantEntry(
            name,
            shape,
            tensor.spec,
            tensor.layout,
            tensor.method if tensor.method == "grid" else "rtn",
            blocks(),
            lambda: error_ratio(sums),
            lambda: misfit(int(sums[2]), int(sums[3])),
        )

    def _shape(self, name: str) -> tuple[int, int]:
        rows, cols = self._checkpoint.tensors[name].shape
        return rows, cols

    def _split(self, name: str) -> Iterator[Rows]:
        rows, cols = self._shape(name)
        step = _piece_rows(cols, self._plan.tensors[name])
        for start in range(0, rows, step):
            yield Rows(name, start, min(start + step, rows))

    def _round(self, rows: Rows) -> RoundedRows:
        weight = self._checkpoint.rows(rows.name, rows.start, rows.stop)
        plan = self._plan.tensors[rows.name]
        if plan.method == "grid":
            tensor, fits = recover(weight, plan.spec, self._checkpoint.tensors[rows.name].dtype)
            fitting = int(fits.sum())
        else:
            tensor = quantize_rtn(weight, plan.spec)
            fitting = tensor.scales.size
        checked(rows.name, tensor)
        sums = np.append(squared_error(weight, tensor), [fitting, tensor.scales.size])
        return RoundedRows(tensor, sums)


def ahead(
    pool: ThreadPoolExecutor, work: Callable[[Task], Result], tasks: Iterable[Task], depth: int
) -> Iterator[Result]:
    """`map` over threads, in order, that never runs more than `depth` results ahead.

    The first tasks begin at once, before a result is asked for.
    """
    left = iter(tasks)
    waiting = deque(pool.submit(work, task) for task in islice(left, depth))

    def results() -> Iterator[Result]:
        while waiting:
            result = waiting.popleft().result()
            waiting.extend(pool.submit(work, task) for task in islice(left, 1))
            yield result

    return results()


def _piece_rows(cols: int, tensor: TensorPlan) -> int:
    """Rows of a piece: whole row blocks of the layout."""
    height = LAYOUTS[tensor.layout].row_block(tensor.spec)
    return max(1, PIECE // (cols * height)) * height
