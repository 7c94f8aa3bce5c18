"""Buffers that are used again: making one maps and locks memory, which takes longer than a run."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from uq.kernels.npu.runtime.faults import refused

PAGE = 4096
Key = tuple[int, str, int]


class Pool:
    """Buffers by size, a power of two pages, and by kind and memory group."""

    def __init__(self, xrt: Any, device: Any) -> None:
        self._xrt = xrt
        self._device = device
        self._free: dict[Key, list[Any]] = defaultdict(list)
        self.made = 0
        self.nbytes = 0

    @contextmanager
    def take(self, nbytes: int, flags: str, group: int) -> Iterator[Any]:
        """A buffer of at least `nbytes`, given back at the end; dropped if the run failed, as the
        NPU may still write into it.

        Args:
            flags: `cacheable` for instructions, `host_only` for data.

        Raises:
            DeviceError: there is no memory for it.
        """
        pages = 1 << (-(-nbytes // PAGE) - 1).bit_length()  # a growing cache finds its size again
        key = (pages * PAGE, flags, group)
        buffer = self._free[key].pop() if self._free[key] else self._make(key)
        yield buffer
        self._free[key].append(buffer)

    def clear(self) -> None:
        """Release all that is not in use; XRT frees a buffer with its last reference."""
        self._free.clear()
        self.nbytes = 0

    def _make(self, key: Key) -> Any:
        nbytes, flags, group = key
        kind = getattr(self._xrt.bo.flags, flags)
        try:
            buffer = self._xrt.bo(self._device, nbytes, kind, group)
        except RuntimeError as error:
            raise refused(f"no buffer of {nbytes:,} bytes for the NPU", error) from error
        self.made += 1
        self.nbytes += nbytes
        return buffer
