"""The layer between uq and its disk (`faults.c`): compiled, loaded, told when to fail."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path

from uq.errors import ToolMissing

SOURCE = Path(__file__).with_name("faults.c")


@dataclass(frozen=True)
class Fault:
    """When the process is killed or its disk fails; None: never.

    Attributes:
        seconds: SIGKILL after so many seconds.
        change: SIGKILL within the call of this number that changes a file.
        room: bytes until the disk is full.
        sync: number of the `fsync` from which on the disk fails.
        read: number of the read of the source from which on its disk fails.
    """

    seconds: float | None = None
    change: int | None = None
    room: int | None = None
    sync: int | None = None
    read: int | None = None

    @property
    def kind(self) -> str:
        return next((name for name, value in asdict(self).items() if value is not None), "none")


@dataclass(frozen=True)
class Calls:
    """How many calls a run made."""

    changes: int
    syncs: int
    reads: int


def compile_layer(folder: Path) -> Path:
    """Raises ToolMissing: there is no C compiler."""
    compiler = shutil.which("cc")
    if compiler is None:
        raise ToolMissing("cc: is not installed; run: sudo apt-get install gcc libc6-dev")
    library = folder / "faults.so"
    command = [compiler, "-shared", "-fPIC", "-O1", "-Wall", "-Werror", str(SOURCE), "-o"]
    subprocess.run([*command, str(library)], check=True)
    return library


class Layer:
    """The library, in a process that was started with it in front of libc."""

    def __init__(self) -> None:
        self._calls = ctypes.CDLL(None)
        for name in ("changes", "syncs", "reads"):
            getattr(self._calls, f"soak_{name}").restype = ctypes.c_long

    def begin(self, written: Path, source: Path, fault: Fault) -> None:
        """Watch what is written below one folder and read below another, from now on."""
        numbers = (fault.change, fault.room, fault.sync, fault.read)
        longs = [ctypes.c_long(-1 if number is None else number) for number in numbers]
        self._calls.soak_begin(str(written).encode(), str(source).encode(), *longs)

    def calls(self) -> Calls:
        return Calls(*(getattr(self._calls, f"soak_{n}")() for n in ("changes", "syncs", "reads")))
