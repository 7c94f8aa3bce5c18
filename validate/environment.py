"""What the report says about the machine and the process."""

from __future__ import annotations

import platform
import re
import shlex
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import numba
import numpy as np
import psutil

from uq.validate.report import Environment

CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
STATUS = Path("/proc/self/status")
UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def environment(command: Sequence[str], threads: int) -> Environment:
    """Versions, system and time of now. `command` is the argument list that the user gave."""
    return Environment(
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        command=shlex.join(command),
        system=platform.platform(),
        python=platform.python_version(),
        numpy=np.__version__,
        numba=numba.__version__,
        threads=threads,
        last_level_cache_bytes=last_level_cache(),
    )


def last_level_cache(caches: Path = CACHES) -> int | None:
    """Bytes of the largest cache that the first core sees; None where the system does not say."""
    sizes = [_bytes(path.read_text().strip()) for path in caches.glob("index*/size")]
    return max(sizes, default=None)


def _bytes(text: str) -> int:
    return int(text.rstrip("KMG")) * UNITS.get(text[-1], 1)


def peak_memory() -> int:
    """Peak resident bytes of this process so far, memory-mapped file pages included."""
    if STATUS.exists():
        # getrusage would also count the parent that started this process
        found = re.search(r"VmHWM:\s+(\d+) kB", STATUS.read_text())
        if found:
            return int(found[1]) * 1024
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
