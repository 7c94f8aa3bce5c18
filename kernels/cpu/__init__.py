"""The CPU backend: numba kernels that compute on packed codes."""

from __future__ import annotations

from uq.formats.bundle import Bundle
from uq.kernels.cpu.session import CpuSession


def open_cpu(bundle: Bundle, *, max_context: int = 4096, threads: int | None = None) -> CpuSession:
    """Lay a bundle's weights out for this processor.

    Args:
        max_context: tokens that the KV cache holds.
        threads: None is one for every core.

    Raises:
        UsageError: `max_context` or `threads` is out of range.
    """
    return CpuSession(bundle.config, bundle, max_context=max_context, threads=threads)
