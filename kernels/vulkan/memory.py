"""Memory of a device: slabs handed out in pieces, and the way of bytes to and from them."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from uq.errors import DeviceError
from uq.kernels.vulkan.api import binding, call, constant, create, new
from uq.kernels.vulkan.commands import Recorder, Submission
from uq.kernels.vulkan.device import Gpu
from uq.kernels.vulkan.heaps import LOCAL

ALIGNMENT = 256  # of every piece: a cache line or more on all devices
SLAB, LEAST_SLAB = 1 << 30, 1 << 20
STAGING = 64 << 20
HALF = STAGING // 2
COPY_THREADS, WORTH_THREADS = 4, 4 << 20
HOST = ("MEMORY_PROPERTY_HOST_VISIBLE_BIT", "MEMORY_PROPERTY_HOST_COHERENT_BIT")
CACHED = (*HOST, "MEMORY_PROPERTY_HOST_CACHED_BIT")
USAGES = (
    "BUFFER_USAGE_STORAGE_BUFFER_BIT",
    "BUFFER_USAGE_TRANSFER_SRC_BIT",
    "BUFFER_USAGE_TRANSFER_DST_BIT",
    "BUFFER_USAGE_SHADER_DEVICE_ADDRESS_BIT",
)


@dataclass(frozen=True)
class Span:
    """Bytes of a buffer. `address` is what a kernel is given."""

    buffer: Any
    offset: int
    nbytes: int
    address: int

    def part(self, start: int, nbytes: int) -> Span:
        return Span(self.buffer, self.offset + start, nbytes, self.address + start)


class Slab:
    """A buffer with memory of its own; host-visible ones are mapped.

    Attributes:
        bytes: the mapped memory, uint8; None where the host does not see it.
    """

    def __init__(self, gpu: Gpu, nbytes: int, properties: tuple[str, ...]) -> None:
        self._gpu = gpu
        null = binding().ffi.NULL
        usage = sum(constant(name) for name in USAGES)
        info = new("BufferCreateInfo", size=nbytes, usage=usage)
        self.buffer = create("CreateBuffer", "VkBuffer", gpu.device, info, null)
        needs = binding().ffi.new("VkMemoryRequirements*")
        call("GetBufferMemoryRequirements", gpu.device, self.buffer, needs)
        try:
            self._memory = _allocate(gpu, needs, properties)
        except DeviceError:
            call("DestroyBuffer", gpu.device, self.buffer, null)
            raise
        call("BindBufferMemory", gpu.device, self.buffer, self._memory, 0)
        where = new("BufferDeviceAddressInfo", buffer=self.buffer)
        address = int(binding().lib.vkGetBufferDeviceAddress(gpu.device, where))
        self.span = Span(self.buffer, 0, nbytes, address)
        visible = properties != LOCAL
        self.bytes: NDArray[np.uint8] | None = self._map(nbytes) if visible else None

    def _map(self, nbytes: int) -> NDArray[np.uint8]:
        pointer = create("MapMemory", "void*", self._gpu.device, self._memory, 0, nbytes, 0)
        return np.frombuffer(binding().ffi.buffer(pointer, nbytes), np.uint8)

    def close(self) -> None:
        null = binding().ffi.NULL
        self.bytes = None
        call("DestroyBuffer", self._gpu.device, self.buffer, null)
        call("FreeMemory", self._gpu.device, self._memory, null)


class Arena:
    """Memory, handed out from the front of slabs, never given back one by one."""

    def __init__(self, gpu: Gpu, expected: int, properties: tuple[str, ...] = LOCAL) -> None:
        """
        Args:
            expected: bytes that will be taken, about; decides how large a slab is.
            properties: of the memory; the usual one is the device's own.
        """
        self._gpu, self._properties = gpu, properties
        self._expected = aligned(expected)  # of what was not taken yet
        self._slabs: list[Slab] = []
        self._used = 0

    @property
    def nbytes(self) -> int:
        """Of all slabs."""
        return sum(slab.span.nbytes for slab in self._slabs)

    def take(self, nbytes: int) -> Span:
        size = aligned(nbytes)
        if not self._slabs or self._used + size > self._slabs[-1].span.nbytes:
            fresh = max(size, min(self._expected, SLAB), LEAST_SLAB)
            self._slabs.append(Slab(self._gpu, fresh, self._properties))
            self._used = 0
        span = self._slabs[-1].span.part(self._used, nbytes)
        self._used += size
        self._expected = max(self._expected - size, 0)
        return span

    def close(self) -> None:
        for slab in self._slabs:
            slab.close()
        self._slabs.clear()


class Copy:
    """A copy that the device is at."""

    def __init__(self, gpu: Gpu, source: Span, target: Span) -> None:
        self._recorder = Recorder(gpu)
        self._recorder.copy(source, target)
        self._recorder.end()
        self._submission = Submission(gpu, [self._recorder.commands])
        self._submission.start()

    def finish(self) -> None:
        self._submission.finish()
        self._submission.close()
        self._recorder.close()


class Transfers:
    """Copies between the host and device-local memory through mapped memory.

    The mapped memory has two halves: while the device copies one, the host's threads fill or empty
    the other.
    """

    def __init__(self, gpu: Gpu) -> None:
        self._gpu = gpu
        self._up: Slab | None = None
        self._down: Slab | None = None
        self._threads = ThreadPoolExecutor(COPY_THREADS)

    def write(self, span: Span, data: NDArray[Any]) -> None:
        """Copy `data` to the front of `span`; the data is on the device when this returns."""
        source = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
        if self._up is None:
            self._up = Slab(self._gpu, STAGING, HOST)
        running: list[Copy] = []
        for number, start in enumerate(range(0, source.size, HALF)):
            if len(running) > 1:
                running.pop(0).finish()
            piece = source[start : start + HALF]
            mapped, staged = self._half(self._up, number, piece.size)
            self._spread_copy(mapped, piece)
            running.append(Copy(self._gpu, staged, span.part(start, piece.size)))
        for copy in running:
            copy.finish()

    def read(self, span: Span) -> NDArray[np.uint8]:
        out = np.empty(span.nbytes, np.uint8)
        if self._down is None:
            self._down = Slab(self._gpu, STAGING, CACHED)
        waiting: list[tuple[Copy, NDArray[np.uint8], NDArray[np.uint8]]] = []
        for number, start in enumerate(range(0, out.size, HALF)):
            piece = out[start : start + HALF]
            mapped, staged = self._half(self._down, number, piece.size)
            waiting.append((Copy(self._gpu, span.part(start, piece.size), staged), piece, mapped))
            if len(waiting) > 1:
                self._collect(*waiting.pop(0))
        for each in waiting:
            self._collect(*each)
        return out

    def _half(self, slab: Slab, number: int, nbytes: int) -> tuple[NDArray[np.uint8], Span]:
        """The front of one of its halves, mapped and as a span."""
        assert slab.bytes is not None
        start = number % 2 * HALF
        return slab.bytes[start : start + nbytes], slab.span.part(start, nbytes)

    def _collect(self, copy: Copy, target: NDArray[np.uint8], mapped: NDArray[np.uint8]) -> None:
        copy.finish()
        self._spread_copy(target, mapped)

    def _spread_copy(self, target: NDArray[np.uint8], source: NDArray[np.uint8]) -> None:
        """target = source; large ones by several threads."""
        if source.size < WORTH_THREADS:
            target[:] = source
            return
        step = -(-source.size // COPY_THREADS)
        parts = (slice(start, start + step) for start in range(0, source.size, step))
        list(self._threads.map(lambda part: np.copyto(target[part], source[part]), parts))

    def fill(self, span: Span) -> None:
        """Zeros."""
        recorder = Recorder(self._gpu)
        recorder.fill(span.buffer, span.offset, aligned(span.nbytes, 4))
        recorder.end()
        submission = Submission(self._gpu, [recorder.commands])
        submission.run()
        submission.close()
        recorder.close()

    def close(self) -> None:
        self._threads.shutdown()
        for slab in (self._up, self._down):
            if slab is not None:
                slab.close()


def aligned(nbytes: int, alignment: int = ALIGNMENT) -> int:
    return -(-nbytes // alignment) * alignment


def _allocate(gpu: Gpu, needs: Any, properties: tuple[str, ...]) -> Any:
    """VkDeviceMemory of the first type that has room."""
    flags = new("MemoryAllocateFlagsInfo", flags=constant("MEMORY_ALLOCATE_DEVICE_ADDRESS_BIT"))
    for index in gpu.physical.heaps.fitting(needs.size, needs.memoryTypeBits, properties):
        info = new(
            "MemoryAllocateInfo",
            pNext=flags,
            allocationSize=needs.size,
            memoryTypeIndex=index,
        )
        with suppress(DeviceError):
            return create("AllocateMemory", "VkDeviceMemory", gpu.device, info, binding().ffi.NULL)
    nbytes, most = needs.size, gpu.physical.largest_allocation
    if nbytes > most:  # some drivers give more than they promise
        raise DeviceError(
            f"{gpu.physical.name}: {nbytes / 2**30:.1f} GiB are needed at once, its driver gives "
            f"{most / 2**30:.1f}; use fewer bits, a shorter context or --device cpu"
        )
    raise DeviceError(
        f"{gpu.physical.name} has no {nbytes / 2**20:.0f} MiB left of its "
        f"{gpu.physical.memory / 2**30:.1f} GiB; close other programs that use it, use fewer bits, "
        "a shorter context or --device cpu"
    )
