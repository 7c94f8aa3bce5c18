"""What a build consists of: commands of tools, and work that uq does itself between them.

All file names are relative to the work folder, in which every command runs.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Command:
    """A tool's command line."""

    stage: str
    argv: tuple[str, ...]

    def __str__(self) -> str:
        return shlex.join(self.argv)


@dataclass(frozen=True)
class Own:
    """Work of uq on files of the work folder; `what` says it in words."""

    stage: str
    what: str
    do: Callable[[Path], None]

    def __str__(self) -> str:
        return f"# uq: {self.what}"


Step = Command | Own
DESIGN, INSTS, PDI, XCLBIN = "design.mlir", "insts.bin", "design.pdi", "aie.xclbin"
CDOS = ("elfs", "init", "enable")  # the order in which they are loaded


def find_one(folder: Path, pattern: str) -> Path:
    """The file that a tool wrote; their names and places differ between versions.

    Raises:
        FileNotFoundError: it wrote none.
    """
    found = sorted(folder.rglob(pattern))
    if not found:
        raise FileNotFoundError(f"no {pattern} was written")
    return found[0]
