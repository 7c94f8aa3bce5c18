"""Tensors that need no statistics: read, rounded, tiled and handed on in pieces of rows.

A farm works ahead of the writer, over the borders of tensors and shards. The pieces do not depend
on who works, so neither do the bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from uq.formats.checkpoint import Checkpoint
from uq.formats.layouts import LAYOUTS
from uq.formats.writer import QuantEntry, TiledRows
from uq.quantize.farm import Farm
from uq.quantize.plan import Plan, TensorPlan
from uq.quantize.recover import misfit, recover
from uq.quantize.scales import checked, error_ratio, quantize_rtn, squared_error

PIECE = 1 << 20  # weights
PIECES_AHEAD = 48  # enough to hide the pauses of the disk
PIECES_SENT = 8  # in one message to another machine: long beside its latency


@dataclass(frozen=True)
class Rows:
    """Rows `start:stop` of a tensor, and what becomes of them."""

    name: str
    start: int
    stop: int
    plan: TensorPlan

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class RoundedRows:
    """A piece of a quantized tensor.

    Attributes:
        sums: the two of `squared_error`, groups that were quantized as planned, groups.
    """

    tiled: TiledRows
    sums: NDArray[np.float64]


class RoundedTensors:
    """Bundle entries of the named tensors; they must be written in this order."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        plan: Plan,
        names: Sequence[str],
        farm: Farm,
        started: Callable[[str], None],
    ) -> None:
        """`started` is called with a tensor's name before its first piece is written."""
        self._checkpoint = checkpoint
        self._plan = plan
        self._started = started
        tasks = (rows for name in names for rows in self._split(name))
        self._pieces = farm.map(round_rows, tasks, ahead=PIECES_AHEAD, together=PIECES_SENT)

    def entry(self, name: str) -> QuantEntry:
        """The tensor as an entry whose blocks arrive while it is written."""
        tensor, sums = self._plan.tensors[name], np.zeros(4)

        def blocks() -> Iterator[TiledRows]:
            self._started(name)
            for _ in self._split(name):
                piece = next(self._pieces)
                np.add(sums, piece.sums, out=sums)
                yield piece.tiled

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
        plan = self._plan.tensors[name]
        step = _piece_rows(cols, plan)
        for start in range(0, rows, step):
            yield Rows(name, start, min(start + step, rows), plan)


def round_rows(checkpoint: Checkpoint, rows: Rows) -> RoundedRows:
    """Raises CheckpointError: a weight is not finite, or too large."""
    weight = checkpoint.rows(rows.name, rows.start, rows.stop)
    plan = rows.plan
    if plan.method == "grid":
        tensor, fits = recover(weight, plan.spec, checkpoint.tensors[rows.name].dtype)
        fitting = int(fits.sum())
    else:
        tensor = quantize_rtn(weight, plan.spec)
        fitting = tensor.scales.size
    checked(rows.name, tensor)
    sums = np.append(squared_error(weight, tensor), [fitting, tensor.scales.size])
    return RoundedRows(TiledRows.of(tensor, plan.layout), sums)


def _piece_rows(cols: int, tensor: TensorPlan) -> int:
    """Rows of a piece: whole row blocks of the layout."""
    height = LAYOUTS[tensor.layout].row_block(tensor.spec)
    return max(1, PIECE // (cols * height)) * height
