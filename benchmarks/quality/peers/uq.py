"""uq itself, by its command line."""

from __future__ import annotations

import hashlib
import sys
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path

from benchmarks.quality.calibration import Draw
from benchmarks.quality.models import Model, open_bundle_model
from benchmarks.quality.rows import Row
from benchmarks.quality.source import Reference
from benchmarks.quality.steps import OUT, Step

PACKAGES = ("uq.formats", "uq.formats.checkpoint", "uq.kernels", "uq.quantize")


@dataclass(frozen=True)
class Uq:
    reference: Reference
    calibration_tokens: int

    def missing(self, row: Row) -> str | None:
        return None

    def steps(self, row: Row, draw: Draw) -> tuple[Step, ...]:
        options = [*row.arguments]
        if row.calibrated:
            options += ["--calibration-tokens", str(self.calibration_tokens)]
            options += [] if draw.seed is None else ["--calibration-seed", str(draw.seed)]
        command = (sys.executable, "-m", "uq", "quantize", str(self.reference.folder))
        identity = {
            "uq": source_hash(),
            "reference": self.reference.sha256,
            "options": options,
            "files": [file_hash(Path(word)) for word in options if Path(word).is_file()],
            "calibration": draw.sha256 if row.calibrated else None,
        }
        return (Step(row.made_for, (*command, "-o", OUT, "--restart", *options), identity),)

    def open(self, output: Path) -> Model:
        return open_bundle_model(output, self.reference.checkpoint)


def file_hash(path: Path) -> str:
    """Of a file that an option names, such as a calibration text."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


@cache
def source_hash() -> str:
    """Of the modules that decide the bytes of a bundle."""
    digest = hashlib.sha256()
    for package in map(import_module, PACKAGES):
        for path in sorted(Path(package.__path__[0]).glob("*.py")):
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()
