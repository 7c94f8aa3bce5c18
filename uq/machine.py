"""What this machine and this installation offer: the facts behind `uq doctor`."""

from __future__ import annotations

import os
import platform
import re
import shutil
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import psutil
from llvmlite import binding as llvm

from uq import __version__
from uq.kernels.backends import backends

DISTRIBUTION = "unicorn-quant"
# The instruction sets that decide how fast the CPU kernels are.
FEATURES = ("avx2", "fma", "f16c", "avxvnni", "avx512f", "avx512bw", "avx512vnni", "avx512bf16")


@dataclass(frozen=True)
class Availability:
    available: bool
    reason: str


@dataclass(frozen=True)
class Machine:
    """Sizes in bytes; `packages` maps a required distribution to its version, None when missing."""

    uq: str
    python: str
    system: str
    packages: dict[str, str | None]
    cpu: str
    cores: int
    threads: int
    features: tuple[str, ...]
    memory: int
    memory_available: int
    disk_free: int
    backends: dict[str, Availability]


def examine() -> Machine:
    """Look at the machine; runs nothing on a device and writes nothing."""
    present = llvm.get_host_cpu_features()
    memory = psutil.virtual_memory()
    return Machine(
        uq=__version__,
        python=f"{platform.python_version()} ({sys.executable})",
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        packages={name: _version(name) for name in _required_packages()},
        cpu=_cpu_name(),
        cores=psutil.cpu_count(logical=False) or 1,
        threads=_usable_threads(),
        features=tuple(name for name in FEATURES if present.get(name)),
        memory=memory.total,
        memory_available=memory.available,
        disk_free=shutil.disk_usage(Path.cwd()).free,
        backends={b.name: Availability(b.available, b.reason) for b in backends()},
    )


def _required_packages() -> list[str]:
    """Distributions that uq cannot run without, from its metadata; uq itself if it has none."""
    try:
        lines = [line for line in requires(DISTRIBUTION) or [] if "extra ==" not in line]
    except PackageNotFoundError:  # it runs from a folder of sources that was never installed
        return [DISTRIBUTION]
    return sorted(re.split(r"[^\w.-]", line, maxsplit=1)[0] for line in lines)


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.is_file() else ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1] if found else platform.processor() or platform.machine()


def _usable_threads() -> int:
    """Threads this process may use: fewer than the machine's under taskset or in a container."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
