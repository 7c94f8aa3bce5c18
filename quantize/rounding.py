"""Tensors that need no statistics: read, rounded, tiled and handed on in pieces of rows.

A farm works ahead of the writer, over the borders of tensors and shards. The pieces do not depend
on who works, so neither do the bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from uq.formats.checkpoint import Checkpoint
from uq.formats.checkpoint.content import block_digest, blocks, tensor_content
from uq.formats.checkpoint.tensors import as_float32, raw_rows
from uq.formats.writer import QuantEntry, TiledRows
from uq.progress import Progress
from uq.quantize.farm import Farm
from uq.quantize.plan import Plan, TensorPlan
from uq.quantize.recover import misfit, recover
from uq.quantize.scales import checked, error_ratio, quantize_rtn, round_symmetric, squared_error

PIECES_AHEAD = 12  # that are done and wait for the disk, of a megabyte each
PIECES_SENT = 8  # in one message to another machine: long beside its latency


@dataclass(frozen=True)
class Rows:
    """Rows `start:stop` of a tensor, a block of its content, and what becomes of them."""

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
        digest: of the bytes it was made from.
    """

    tiled: TiledRows
    sums: NDArray[np.float64]
    digest: bytes


class RoundedTensors:
    """Bundle entries of the named tensors; they must be written in this order."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        plan: Plan,
        names: Sequence[str],
        farm: Farm,
        started: Callable[[str], None],
        contents: MutableMapping[str, str],
    ) -> None:
        """
        Args:
            started: is called with a tensor's name before its first piece is written.
            contents: the hash of each tensor is entered here behind its last piece.
        """
        self._checkpoint = checkpoint
        self._plan = plan
        self._started = started
        self._contents = contents
        tasks = (rows for name in names for rows in self._split(name))
        self._pieces = farm.map(round_rows, tasks, ahead=PIECES_AHEAD, together=PIECES_SENT)

    def entry(self, name: str) -> QuantEntry:
        """The tensor as an entry whose blocks arrive while it is written."""
        tensor, info, sums = self._plan.tensors[name], self._checkpoint.tensors[name], np.zeros(4)

        def tiled() -> Iterator[TiledRows]:
            self._started(name)
            digests = []
            for _ in blocks(info):
                piece = next(self._pieces)
                np.add(sums, piece.sums, out=sums)
                digests.append(piece.digest)
                yield piece.tiled
            self._contents[name] = tensor_content(info, digests)

        rows, cols = info.shape
        return QuantEntry(
            name,
            (rows, cols),
            tensor.spec,
            tensor.layout,
            tensor.method if tensor.method == "grid" else "rtn",
            tiled(),
            lambda: error_ratio(sums),
            lambda: misfit(int(sums[2]), int(sums[3])),
        )

    def _split(self, name: str) -> Iterator[Rows]:
        plan = self._plan.tensors[name]
        for start, stop in blocks(self._checkpoint.tensors[name]):
            yield Rows(name, start, stop, plan)


def round_rows(checkpoint: Checkpoint, rows: Rows, progress: Progress) -> RoundedRows:
    """Raises CheckpointError: a weight is not finite, or too large."""
    info, plan = checkpoint.tensors[rows.name], rows.plan
    raw = raw_rows(info, rows.start, rows.stop)
    fitting = raw.shape[0] * (info.shape[1] // plan.spec.group)
    groups = fitting
    plain = not plan.spec.zero_point and not plan.spec.row_step
    if plan.method == "rtn" and plain and info.dtype == "bf16":
        tensor, sums = round_symmetric(raw.view("<u2"), plan.spec)  # in one go
        if not np.isfinite(sums).all():
            as_float32(info, raw, rows.start)  # says which
    else:
        weight = as_float32(info, raw, rows.start)
        if plan.method == "grid":
            tensor, fits = recover(weight, plan.spec, info.dtype)
            fitting = int(fits.sum())
        else:
            tensor = quantize_rtn(weight, plan.spec)
        sums = squared_error(weight, tensor)
    tiled = TiledRows.of(checked(rows.name, tensor), plan.layout)
    return RoundedRows(tiled, np.append(sums, [fitting, groups]), block_digest(raw))
