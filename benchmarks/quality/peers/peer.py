"""What the benchmark asks of a quantizer."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from benchmarks.quality.calibration import Draw
from benchmarks.quality.models import Model
from benchmarks.quality.rows import Row
from benchmarks.quality.steps import Step


class Peer(Protocol):
    """A quantizer, bound to the reference that it quantizes."""

    def missing(self, row: Row) -> str | None:
        """Why the row cannot be made here; None if it can."""
        ...

    def steps(self, row: Row, draw: Draw) -> tuple[Step, ...]:
        """The processes that make the row, in order; the last one writes the weights.

        Raises:
            NotRun: a step before them failed.
        """
        ...

    def open(self, output: Path) -> Model:
        """What the last step wrote."""
        ...
