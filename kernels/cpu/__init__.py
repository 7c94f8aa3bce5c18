"""The CPU backend: numba kernels that compute on packed codes."""

from __future__ import annotations

import os
from pathlib import Path

# Between two kernels GNU OpenMP's threads spin, by default for milliseconds. That keeps the core
# that the other thread needs when the machine is busy: decoding fell from 110 tokens/s to 2. Some
# 0.1 ms bridge the gaps of a token and cost 2 % on an idle machine. Read when numba loads OpenMP.
os.environ.setdefault("GOMP_SPINCOUNT", "5000")

from uq.formats.bundle import Bundle  # noqa: E402
from uq.kernels.cpu.gemv import gemv  # noqa: E402
from uq.kernels.cpu.session import CpuSession  # noqa: E402


def open_cpu(bundle: Bundle, *, max_context: int = 4096, threads: int | None = None) -> CpuSession:
    """Lay a bundle's weights out for this processor.

    Args:
        max_context: tokens that the KV cache holds.
        threads: None is one for every core.

    Raises:
        UsageError: `max_context` or `threads` is out of range.
    """
    return CpuSession(bundle.config, bundle, max_context=max_context, threads=threads)


def kernels_are_compiled() -> bool:
    """Whether an earlier run has left the compiled kernels on the disk, as far as one can see."""
    return any(Path(gemv.stats.cache_path).glob("gemv.gemv-*.nbi"))
