"""How fast this machine reads memory: the bound of every decode speed."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import numpy as np
import psutil
from numba import njit, prange
from numpy.typing import NDArray

from uq.errors import DeviceError
from uq.kernels.session import Session
from uq.validate.environment import last_level_cache

MIB = 1 << 20
MIN_BYTES, MAX_BYTES = 256 * MIB, 2048 * MIB
BLOCK = 1 << 13  # uint64 words that one thread sums at a time: 64 KiB


@dataclass(frozen=True)
class Bandwidth:
    """Read bandwidth in 1e9 bytes per second.

    Attributes:
        best, median: over `repeats` passes through the buffer.
        buffer_bytes: size of the buffer; well beyond the last-level cache unless memory is short.
    """

    best: float
    median: float
    buffer_bytes: int
    repeats: int


@njit(parallel=True, cache=True)
def _parallel_sum(words: NDArray[np.uint64]) -> np.uint64:
    """Sum modulo 2**64 of (blocks, BLOCK) words; integers, so that the loop vectorizes exactly.

    Of each block four parts at a time: one after the other, additions hold memory up.
    """
    total, quarter = np.uint64(0), words.shape[1] // 4
    for block in prange(words.shape[0]):
        row = words[block]
        a = b = c = d = np.uint64(0)
        for i in range(quarter):
            a += row[i]
            b += row[quarter + i]
            c += row[2 * quarter + i]
            d += row[3 * quarter + i]
        total += a + b + c + d
    return total


def buffer_size(cache: int | None, available: int) -> int:
    """Four times the last-level cache within 256 MiB to 2 GiB, at most a quarter of free memory.

    Raises:
        DeviceError: a quarter of the free memory is less than 256 MiB.
    """
    if available < 4 * MIN_BYTES:
        raise DeviceError(
            f"{available // MIB} MiB of memory are free; measuring the read bandwidth needs "
            f"{4 * MIN_BYTES // MIB}; close other programs or skip the speeds"
        )
    wanted = max(MIN_BYTES, 4 * (cache or 0))
    return min(wanted, MAX_BYTES, available // 4)


@dataclass(frozen=True)
class Ceiling:
    """What bounds the decode speed of a session.

    Attributes:
        bandwidth_gb_s: of the memory that its weights are read from, measured.
        cache_bytes: last-level cache in front of it; None where it is not known.
    """

    bandwidth_gb_s: float
    cache_bytes: int | None

    @classmethod
    def of(cls, session: Session) -> Ceiling:
        """Measured now.

        Raises:
            DeviceError: too little free memory for a buffer that no cache holds.
        """
        if session.probe is None:
            return cls(measure_bandwidth().best, last_level_cache())
        return cls(session.probe.read_bandwidth() / 1e9, None)


def measure_bandwidth(
    *, repeats: int = 15, clock: Callable[[], float] = time.perf_counter
) -> Bandwidth:
    """Sum a large buffer with all threads `repeats` times, after one uncounted pass.

    Raises:
        DeviceError: too little free memory for a buffer that no cache holds.
    """
    size = buffer_size(last_level_cache(), psutil.virtual_memory().available)
    # ones, not zeros: untouched zero pages are one page of physical memory
    words = np.ones((size // (8 * BLOCK), BLOCK), dtype=np.uint64)
    _parallel_sum(words)
    rates = []
    for _ in range(repeats):
        began = clock()
        total = _parallel_sum(words)
        rates.append(words.nbytes / (clock() - began) / 1e9)
        if total != words.size:
            raise DeviceError(f"memory test: {words.size} ones sum to {total}; check the memory")
    return Bandwidth(max(rates), median(rates), words.nbytes, repeats)
