"""llama.cpp: llama-quantize, with and without the importance matrix of llama-imatrix."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from benchmarks.quality.calibration import Draw
from benchmarks.quality.engine import TOOL, Engine
from benchmarks.quality.errors import NotRun
from benchmarks.quality.models import Model, open_gguf_model
from benchmarks.quality.rows import Row
from benchmarks.quality.source import Reference, require_same_weights
from benchmarks.quality.steps import OUT, Step, run
from benchmarks.quality.texts import CONTEXT
from uq.formats.checkpoint import open_checkpoint

QUANTIZE, IMATRIX = "llama-quantize", "llama-imatrix"
BINARIES = (QUANTIZE, IMATRIX, "*.so", "*.so.*", "*.dylib", "*.dll")


@dataclass(frozen=True)
class LlamaCpp:
    """The tools in a folder, None for none.

    Attributes:
        threads: of the tools, which else take every core of the machine, however few they may use.
    """

    reference: Reference
    tools: Path | None
    work: Path
    machine: str
    threads: int

    def missing(self, row: Row) -> str | None:
        if self.reference.gguf is None:
            return "llama-quantize starts from a GGUF file, and the model is none"
        if self.tools is None:
            return "no folder of llama.cpp tools was given (--llama-bin)"
        needed = (QUANTIZE, *((IMATRIX,) * row.calibrated), *((TOOL,) * row.engine))
        absent = [name for name in needed if not (self.tools / name).is_file()]
        return f"{self.tools} has no {' and no '.join(absent)}" if absent else None

    def steps(self, row: Row, draw: Draw) -> tuple[Step, ...]:
        (grid,) = row.arguments
        f16 = str(self.f16)
        matrix = (self._matrix(draw),) if row.calibrated else ()
        options = [word for step in matrix for word in ("--imatrix", str(step.output(self.work)))]
        identity = {
            "version": self.version,
            "f16": self._f16_step.key,
            "grid": grid,
            "matrix": [step.key for step in matrix],
        }
        command = (self._tool(QUANTIZE), *options, f16, OUT, grid, str(self.threads))
        return (*matrix, Step(row.made_for, command, identity))

    def open(self, output: Path) -> Model:
        return open_gguf_model(output)

    @property
    def engine(self) -> Engine | None:
        return None if self.tools is None else Engine(self.tools / TOOL, self.threads)

    @cached_property
    def f16(self) -> Path:
        """The reference's weights as an F16 GGUF, made by llama-quantize and compared here.

        Raises:
            NotRun: llama-quantize failed, or wrote other weights.
        """
        path = run(self._f16_step, self.work, self.machine)
        require_same_weights(self.reference.checkpoint, open_checkpoint(path))
        return path

    @cached_property
    def version(self) -> str:
        """Hash of the tools and the libraries beside them."""
        if self.tools is None:
            raise NotRun("no folder of llama.cpp tools")
        found = [path for pattern in BINARIES for path in self.tools.glob(pattern)]
        files = {path.resolve() for path in found if path.is_file()}
        digest = hashlib.sha256()
        for path in sorted(files):
            digest.update(path.name.encode() + path.read_bytes())
        return digest.hexdigest()

    @property
    def _f16_step(self) -> Step:
        source = str(self.reference.gguf)
        command = (
            self._tool(QUANTIZE),
            "--allow-requantize",
            source,
            OUT,
            "F16",
            str(self.threads),
        )
        identity = {"version": self.version, "reference": self.reference.sha256, "grid": "F16"}
        return Step("F16 GGUF", command, identity, counted=False)

    def _matrix(self, draw: Draw) -> Step:
        inputs = ("-m", str(self.f16), "-f", str(draw.text), "-o", OUT)
        options = ("-c", str(CONTEXT), "-t", str(self.threads), "--no-ppl")
        identity = {
            "version": self.version,
            "f16": self._f16_step.key,
            "calibration": draw.sha256,
            "context": CONTEXT,
        }
        return Step(f"imatrix {draw.number}", (self._tool(IMATRIX), *inputs, *options), identity)

    def _tool(self, name: str) -> str:
        return str((self.tools or Path()) / name)
