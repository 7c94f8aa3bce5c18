"""Run the steps of a build, keep what it made by its content, and write down how it was made."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from uq import __version__
from uq.errors import DeviceError, UqError
from uq.formats.checkpoint.cache import cache_folder
from uq.kernels.npu.toolchain.find import Toolchain
from uq.kernels.npu.toolchain.job import Job
from uq.kernels.npu.toolchain.plan import Dialect, plan
from uq.kernels.npu.toolchain.steps import DESIGN, INSTS, XCLBIN, Command, Step

RECORD = "build.json"
MADE = (XCLBIN, INSTS, RECORD)
PATIENCE = 1800  # seconds for one command
LAST_LINES = 3  # of what a tool said, in the error


class ToolFailed(DeviceError):
    """A tool of the toolchain failed; the message has its command and its last words."""


@dataclass(frozen=True)
class Built:
    """A folder with `aie.xclbin`, `insts.bin` and `build.json`.

    Attributes:
        cached: nothing was run; the same had been built before.
    """

    folder: Path
    record: Mapping[str, Any]
    cached: bool


def ask_tools(toolchain: Toolchain) -> Dialect:
    """Which options the tools take, from their own help."""
    driver = _help(toolchain.tools.get("aiecc"))
    translator = _help(toolchain.tools.get("aie-translate"))
    return Dialect(
        get="aie-generate-xclbin" not in driver,
        to_binary="aie-npu-instgen" not in translator or "aie-npu-to-binary" in translator,
    )


def build(
    job: Job, toolchain: Toolchain, out: Path, *, say: Callable[[str], None] = lambda line: None
) -> Built:
    """Compile a design, or take what an earlier build of the same made.

    Args:
        out: folder for the files; made when it is missing.
        say: gets a line before each step.

    Raises:
        ToolMissing: no compiler.
        ToolFailed: a tool failed; the work folder is kept and named.
        BundleError: what a tool wrote cannot be packaged.
    """
    steps = plan(job, toolchain, ask_tools(toolchain))
    tools = {name: _identity(path) for name, path in toolchain.tools.items()}
    kept = cache_folder() / "npu" / _key(job, steps, tools, toolchain)
    cached = all((kept / name).is_file() for name in MADE)
    if not cached:
        _make(job, steps, tools, kept, say)
    out.mkdir(parents=True, exist_ok=True)
    for name in MADE:
        shutil.copyfile(kept / name, out / name)
    return Built(out, json.loads((out / RECORD).read_text()), cached)


def _make(
    job: Job,
    steps: Iterable[Step],
    tools: Mapping[str, Any],
    kept: Path,
    say: Callable[[str], None],
) -> None:
    kept.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(dir=kept.parent, prefix="work-"))
    (work / DESIGN).write_text(job.text)
    for step in steps:
        say(f"{step.stage}: {step}")
        _run(step, work)
    record = _record(job, steps, tools, work)
    (work / RECORD).write_text(json.dumps(record, indent=2) + "\n")
    for path in work.iterdir():
        if path.name not in MADE:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    shutil.rmtree(kept, ignore_errors=True)
    os.replace(work, kept)


def _run(step: Step, work: Path) -> None:
    if isinstance(step, Command):
        _call(step, work)
        return
    try:
        step.do(work)
    except FileNotFoundError as error:
        raise ToolFailed(f"{step.stage}: {error}; see {work}") from error
    except UqError as error:
        raise type(error)(f"{step.stage}: {error}; see {work}") from error


def _call(step: Command, work: Path) -> None:
    try:
        done = subprocess.run(
            step.argv, cwd=work, capture_output=True, timeout=PATIENCE, stdin=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired as error:
        why = f"took longer than {PATIENCE // 60} minutes"
        raise ToolFailed(f"{step.stage}: {step.argv[0]} {why}; see {work}") from error
    except OSError as error:
        raise ToolFailed(f"{step.stage}: {step.argv[0]}: {error.strerror}") from error
    if done.returncode != 0:
        said = (done.stderr or done.stdout).decode(errors="replace").strip().splitlines()
        words = " / ".join(said[-LAST_LINES:]) or "it said nothing"
        raise ToolFailed(
            f"{step.stage}: {Path(step.argv[0]).name} ended with {done.returncode}: {words}; "
            f"in {work} run: {step}"
        )


def _key(job: Job, steps: Iterable[Step], tools: Mapping[str, Any], toolchain: Toolchain) -> str:
    """Changes with every byte that a tool reads, with the tools, and with how they are called."""
    digest = hashlib.sha256(f"uq {__version__}\0{job.text}\0".encode())
    for object_ in job.objects:
        for part in object_.content():
            digest.update(hashlib.sha256(part).digest())
    places = [str(object_.source.resolve()) for object_ in job.objects]
    for step in steps:
        line = str(step)
        for place in places:  # the same sources elsewhere are the same
            line = line.replace(place, Path(place).name)
        digest.update(line.encode() + b"\0")
    digest.update(json.dumps(tools, sort_keys=True).encode())
    return digest.hexdigest()[:32]


def _record(
    job: Job, steps: Iterable[Step], tools: Mapping[str, Any], work: Path
) -> dict[str, Any]:
    """How it was made, for who finds the files later."""
    missing = [name for name in (XCLBIN, INSTS) if not (work / name).is_file()]
    if missing:
        raise ToolFailed(f"the tools ended well and wrote no {missing[0]}; see {work}")
    sources = {path.source.name: _sha256(path.source) for path in job.objects}
    return {
        "uq": __version__,
        "design": job.name,
        "design_sha256": hashlib.sha256(job.text.encode()).hexdigest(),
        "device": job.device,
        "columns": job.columns,
        "buffers": job.buffers,
        "sources": sources,
        "tools": tools,
        "commands": [str(step) for step in steps],
        "files": {
            name: {"size": (work / name).stat().st_size, "sha256": _sha256(work / name)}
            for name in (XCLBIN, INSTS)
        },
    }


def _identity(path: Path) -> dict[str, str]:
    version = _say(path, "--version").strip().splitlines()
    return {"path": str(path), "version": " ".join(version[:3]), "sha256": _sha256(path)}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _help(path: Path | None) -> str:
    return _say(path, "--help") if path else ""


def _say(path: Path, option: str) -> str:
    try:
        done = subprocess.run(
            (str(path), option), capture_output=True, timeout=60, stdin=subprocess.DEVNULL
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return (done.stdout + done.stderr).decode(errors="replace")
