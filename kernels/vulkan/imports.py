"""Weights read where a bundle's files lie mapped, without a copy: where CPU and GPU share memory.

Not every driver takes mappings that are read-only or of a file (RADV is expected not to: no AMD GPU
was at hand); what is refused is copied.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from uq.errors import DeviceError
from uq.kernels.vulkan.api import binding, call, chain, check, constant, create, extension, new
from uq.kernels.vulkan.device import Gpu, PhysicalGpu, vulkan_instance
from uq.kernels.vulkan.heaps import SHARING
from uq.kernels.vulkan.memory import Span, aligned

Bytes = NDArray[np.uint8]

EXTENSION = "VK_EXT_external_memory_host"
LOADS = 16  # bytes that kernels load at a time, from multiples of that


@dataclass(frozen=True)
class Mapping:
    """Pages of a mapped file that a driver may be given.

    Attributes:
        nbytes: whole pages, the end of the last one behind the file included.
    """

    file: mmap.mmap
    address: int
    nbytes: int

    @classmethod
    def of(cls, data: Bytes, alignment: int) -> Mapping | None:
        """The mapping that `data` is a part of; `alignment`: of what the driver takes."""
        file = getattr(data, "_mmap", None)
        if not isinstance(file, mmap.mmap):
            return None
        start = np.frombuffer(file, np.uint8)
        nbytes = aligned(start.size, mmap.PAGESIZE) // alignment * alignment
        return None if start.ctypes.data % alignment else cls(file, start.ctypes.data, nbytes)


@dataclass(frozen=True)
class Placement:
    """Where a model's weights lie.

    Attributes:
        in_place, copied: bytes read where the bundle is mapped, and in the device's own memory.
        refusal: what the driver said where it did not take a mapping.
    """

    in_place: int
    copied: int
    refusal: str = ""

    def __str__(self) -> str:
        if self.in_place:
            return f"weights read in place, {self.copied / 2**20:.1f} MiB copied"
        return f"weights copied ({self.refusal})" if self.refusal else "weights copied"


class Imports:
    """Buffers over mapped files, each made when it is first asked for.

    Attributes:
        refusal: what the driver said to the first file that it did not take.
        nbytes: of the weights that lie in them.
    """

    def __init__(self, gpu: Gpu) -> None:
        self._gpu = gpu
        self._alignment = pointer_alignment(gpu.physical)
        self._buffers: dict[int, Imported | None] = {}
        self.refusal, self.nbytes = "", 0

    def holds(self, data: Bytes | None) -> bool:
        return data is not None and self._find(data) is not None

    def span(self, parts: Sequence[Bytes | None]) -> Span | None:
        """Where the device sees parts of a file; None: they do not follow each other in one."""
        data = [part for part in parts if part is not None]
        if len(data) < len(parts) or not all(follows(*pair) for pair in pairwise(data)):
            return None
        found, nbytes = self._find(data[0]), sum(part.nbytes for part in data)
        if found is None or found != self._find(data[-1]):
            return None
        self.nbytes += nbytes
        return found.span.part(data[0].ctypes.data - found.mapping.address, nbytes)

    def close(self) -> None:
        for buffer in self._buffers.values():
            if buffer is not None:
                buffer.close()
        self._buffers.clear()

    def _find(self, data: Bytes) -> Imported | None:
        mapping = Mapping.of(data, self._alignment)
        if mapping is None or data.ctypes.data % LOADS:
            return None
        if mapping.address not in self._buffers:
            self._buffers[mapping.address] = self._import(mapping)
        found = self._buffers[mapping.address]
        inside = data.ctypes.data + data.nbytes <= mapping.address + mapping.nbytes
        return found if inside else None

    def _import(self, mapping: Mapping) -> Imported | None:
        try:
            return Imported(self._gpu, mapping)
        except DeviceError as error:
            self.refusal = self.refusal or str(error)
            return None


class Imported:
    """A buffer over a mapping, which it keeps alive."""

    def __init__(self, gpu: Gpu, mapping: Mapping) -> None:
        """Raises DeviceError: the driver refuses."""
        self._gpu, self.mapping = gpu, mapping
        null = binding().ffi.NULL
        handle = constant("EXTERNAL_MEMORY_HANDLE_TYPE_HOST_ALLOCATION_BIT_EXT")
        external = new("ExternalMemoryBufferCreateInfo", handleTypes=handle)
        usage = constant("BUFFER_USAGE_STORAGE_BUFFER_BIT")
        usage |= constant("BUFFER_USAGE_SHADER_DEVICE_ADDRESS_BIT")
        info = new("BufferCreateInfo", pNext=external, size=mapping.nbytes, usage=usage)
        self._buffer = create("CreateBuffer", "VkBuffer", gpu.device, info, null)
        try:
            self._memory = _allocate(gpu, self._buffer, mapping, handle)
        except DeviceError:
            call("DestroyBuffer", gpu.device, self._buffer, null)
            raise
        try:
            call("BindBufferMemory", gpu.device, self._buffer, self._memory, 0)
        except DeviceError:
            self.close()
            raise
        where = new("BufferDeviceAddressInfo", buffer=self._buffer)
        address = int(binding().lib.vkGetBufferDeviceAddress(gpu.device, where))
        self.span = Span(self._buffer, 0, mapping.nbytes, address)

    def close(self) -> None:
        null = binding().ffi.NULL
        call("DestroyBuffer", self._gpu.device, self._buffer, null)
        call("FreeMemory", self._gpu.device, self._memory, null)


def open_imports(gpu: Gpu) -> Imports | None:
    """None where the device has a memory of its own, or cannot be given the host's."""
    physical = gpu.physical
    able = physical.kind in SHARING and EXTENSION in physical.extensions
    return Imports(gpu) if able else None


def follows(before: Bytes | None, data: Bytes | None) -> bool:
    """Whether `data` begins where `before` ends; nothing follows nothing."""
    if before is None or data is None:
        return before is data
    return bool(before.ctypes.data + before.nbytes == data.ctypes.data)


def pointer_alignment(physical: PhysicalGpu) -> int:
    """Of what is given to the driver: address and size."""
    limits = new("PhysicalDeviceExternalMemoryHostPropertiesEXT")
    properties = new("PhysicalDeviceProperties2", pNext=limits)
    call("GetPhysicalDeviceProperties2", physical.handle, properties)
    return int(limits.minImportedHostPointerAlignment)


def _allocate(gpu: Gpu, buffer: Any, mapping: Mapping, handle: int) -> Any:
    """VkDeviceMemory that is the mapping."""
    ffi = binding().ffi
    pointer = ffi.cast("void*", mapping.address)
    needs = ffi.new("VkMemoryRequirements*")
    call("GetBufferMemoryRequirements", gpu.device, buffer, needs)
    allowed = needs.memoryTypeBits & _pointer_types(gpu, handle, pointer)
    if needs.size > mapping.nbytes or not allowed:
        raise DeviceError("the driver has no kind of memory for the pages of a file")
    imported = new("ImportMemoryHostPointerInfoEXT", handleType=handle, pHostPointer=pointer)
    flags = new("MemoryAllocateFlagsInfo", flags=constant("MEMORY_ALLOCATE_DEVICE_ADDRESS_BIT"))
    first = (allowed & -allowed).bit_length() - 1
    info = new("MemoryAllocateInfo", allocationSize=mapping.nbytes, memoryTypeIndex=first)
    chain([info, flags, imported])
    return create("AllocateMemory", "VkDeviceMemory", gpu.device, info, ffi.NULL)


def _pointer_types(gpu: Gpu, handle: int, pointer: Any) -> int:
    """A bit for each type of memory that a pointer can become."""
    properties = new("MemoryHostPointerPropertiesEXT")
    name = "GetMemoryHostPointerPropertiesEXT"
    function = extension(vulkan_instance(), name)
    check(name, function(gpu.device, handle, pointer, properties))
    return int(properties.memoryTypeBits)
