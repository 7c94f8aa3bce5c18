"""A session on a device whose buffers end where no page is: a step beyond one ends the process.

Run as `python -m tests.fenced BUNDLE SLOTS`. Kernels have addresses and no bounds, so nothing else
says when they leave theirs. It takes a driver that imports the host's pages, as Mesa's does.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from typing import Any

import numpy as np

from uq.formats.bundle import open_bundle
from uq.kernels.backends import open_batch
from uq.kernels.session import Piece, Sampling
from uq.kernels.vulkan import imports, memory
from uq.kernels.vulkan.api import binding, call, constant, create, new
from uq.kernels.vulkan.device import Gpu
from uq.kernels.vulkan.heaps import LOCAL
from uq.kernels.vulkan.memory import Arena, Span

PAGE = mmap.PAGESIZE
unfenced = Arena.take
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


class Pages:
    """Of which the first and the last may not be touched; the others are full of NaN."""

    def __init__(self, nbytes: int) -> None:
        self.size = -(-nbytes // PAGE) * PAGE
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        base = libc.mmap(None, self.size + 2 * PAGE, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0)
        self.address = base + PAGE
        ctypes.memset(self.address, 0xFF, self.size)
        for fence in (base, self.address + self.size):
            assert libc.mprotect(fence, PAGE, 0) == 0


def buffer_over(gpu: Gpu, pages: Pages) -> Span:
    handle = constant("EXTERNAL_MEMORY_HANDLE_TYPE_HOST_ALLOCATION_BIT_EXT")
    external = new("ExternalMemoryBufferCreateInfo", handleTypes=handle)
    usage = sum(map(constant, memory.USAGES))
    info = new("BufferCreateInfo", pNext=external, size=pages.size, usage=usage)
    buffer = create("CreateBuffer", "VkBuffer", gpu.device, info, binding().ffi.NULL)
    mapping = imports.Mapping(None, pages.address, pages.size)  # type: ignore[arg-type]
    kept = imports._allocate(gpu, buffer, mapping, handle)
    call("BindBufferMemory", gpu.device, buffer, kept, 0)
    where = new("BufferDeviceAddressInfo", buffer=buffer)
    address = int(binding().lib.vkGetBufferDeviceAddress(gpu.device, where))
    return Span(buffer, 0, pages.size, address)


def take(arena: Arena, nbytes: int) -> Span:
    """In the place of `Arena.take`: what ends at the fence, as near as kernels' loads allow."""
    if arena._properties != LOCAL:
        return unfenced(arena, nbytes)
    span = buffer_over(arena._gpu, Pages(max(nbytes, 1)))
    return span.part(span.nbytes - memory.aligned(nbytes, imports.LOADS), nbytes)


def main(bundle: str, slots: int) -> None:
    Arena.take = take  # type: ignore[method-assign, assignment]
    opened = open_bundle(bundle)
    batch = open_batch(opened, "vulkan", slots=slots, max_context=96)
    rng: Any = np.random.default_rng(0)
    prompt = rng.integers(0, opened.config.vocab_size, 70).tolist()
    hidden = batch.extend([Piece(0, prompt)])
    batch.logits(hidden[-3:], 5, opened.config.vocab_size)
    batch.extend([Piece(slot, [7, 8, 9]) for slot in range(1, slots)])
    batch.write([Piece(slot, [4]) for slot in range(slots)], 3, Sampling())
    batch.write([Piece(0, [4])], 3, Sampling(temperature=1.0, seed=1))
    batch.choose(hidden[:slots], [Sampling()] * slots, [9] * slots)
    print("within its buffers")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
