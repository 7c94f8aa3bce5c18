"""Push constants: what a kernel is given with each dispatch."""

from __future__ import annotations

import struct

from uq.kernels.vulkan.memory import Span


def addresses(*spans: Span) -> bytes:
    return struct.pack(f"<{len(spans)}Q", *(span.address for span in spans))


def words(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}I", *values)


def floats(*values: float) -> bytes:
    return struct.pack(f"<{len(values)}f", *values)
