"""Child processes whose results are kept: what one is, where its result lies, what it cost."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.quality.errors import NotRun

OUT = "{out}"
LAUNCHER = Path(__file__).with_name("launcher.py")
RECORD, LOG, OUTPUT, DRAFT = "record.json", "log.txt", "output", "draft"


@dataclass(frozen=True)
class Cost:
    """Wall time in seconds, peak resident bytes of the process, and where it ran."""

    seconds: float
    peak_bytes: int
    machine: str


@dataclass(frozen=True)
class Step:
    """One child process that writes one file or folder.

    Attributes:
        label: for people.
        command: its arguments; `OUT` stands for what it writes.
        identity: what decides the bytes of the result (versions, hashes of the inputs, options);
            JSON, without paths.
        counted: its cost is part of the quantizer's.
        device: what it runs on beside the processor, for people.
    """

    label: str
    command: tuple[str, ...]
    identity: Mapping[str, object]
    counted: bool = True
    device: str | None = None

    @property
    def key(self) -> str:
        return hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()

    def folder(self, work: Path) -> Path:
        slug = re.sub(r"[^\w.-]+", "-", self.label)
        return work / "steps" / f"{slug}-{self.key[:16]}"

    def output(self, work: Path) -> Path:
        return self.folder(work) / OUTPUT


def kept_cost(step: Step, work: Path) -> Cost | None:
    """What an earlier run of the step cost; None if it was never finished."""
    record = step.folder(work) / RECORD
    return Cost(**json.loads(record.read_text())) if record.is_file() else None


def run(step: Step, work: Path, machine: str) -> Path:
    """The step's result, made now unless it is still there.

    Raises:
        NotRun: the process failed.
    """
    folder, output = step.folder(work), step.output(work)
    if output.exists() and kept_cost(step, work):
        return output
    folder.mkdir(parents=True, exist_ok=True)
    draft = folder / DRAFT
    remove(draft)
    remove(output)
    seconds, peak = _launch([part.replace(OUT, str(draft)) for part in step.command], folder)
    draft.rename(output)
    where = machine if step.device in (None, "cpu") else f"{machine}, {step.device}"
    write_json(folder / RECORD, asdict(Cost(seconds, peak, where)))
    return output


def write_json(path: Path, data: object) -> None:
    """Write a file under its final name in one step."""
    part = path.with_name(f"{path.name}.{os.getpid()}.partial")  # two runs may share a folder
    part.write_text(json.dumps(data, indent=1))
    part.replace(path)


def remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _launch(command: list[str], folder: Path) -> tuple[float, int]:
    """Seconds and peak bytes of a command; its output goes to the folder's log.

    The peak that the system counts for a child begins with that of the process that forked it. So
    a small launcher stands between the child and this process, which holds whole models.
    """
    usage = folder / "usage.json"
    usage.unlink(missing_ok=True)
    with (folder / LOG).open("wb") as log:
        launcher = [sys.executable, "-S", "-E", str(LAUNCHER), str(usage), *command]
        done = subprocess.run(
            launcher, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, check=False
        )
    if done.returncode:
        raise NotRun(f"{Path(command[0]).name} failed ({done.returncode}): {_last_line(folder)}")
    figures = json.loads(usage.read_text())
    return figures["seconds"], figures["peak_bytes"]


def _last_line(folder: Path) -> str:
    lines = (folder / LOG).read_text("utf-8", "replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")
