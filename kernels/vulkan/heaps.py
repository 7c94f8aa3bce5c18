"""Which memory of a device a buffer goes into.

A discrete GPU has one heap of its own. Drivers of GPUs that share the host's memory part it: RADV
says that two thirds are local and one third is not, and other drivers have several local heaps. All
of them are the same chips, so a model may lie in any.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from uq.kernels.vulkan.api import call, constant, new

SHARING = ("integrated", "cpu")  # kinds of devices whose memory is the host's
LOCAL = ("MEMORY_PROPERTY_DEVICE_LOCAL_BIT",)
BUDGET = "VK_EXT_memory_budget"


@dataclass(frozen=True)
class Heap:
    """Memory of a device.

    Attributes:
        left: bytes that this process may still take, as the driver estimates; None: it does not.
    """

    nbytes: int
    is_local: bool
    left: int | None = None


@dataclass(frozen=True)
class MemoryType:
    flags: int
    heap: int


@dataclass(frozen=True)
class Heaps:
    """All memory of a device.

    Attributes:
        is_shared: it is the host's.
    """

    heaps: tuple[Heap, ...]
    types: tuple[MemoryType, ...]
    is_shared: bool

    @property
    def nbytes(self) -> int:
        """That a model may take: of the largest local heap, or of all together."""
        if self.is_shared:
            return sum(heap.nbytes for heap in self.heaps)
        return max((heap.nbytes for heap in self.heaps if heap.is_local), default=0)

    def fitting(self, nbytes: int, allowed: int, properties: Sequence[str]) -> list[int]:
        """Indices of types of memory to try, the best first.

        Args:
            nbytes: to be allocated; heaps whose driver says that less is left are passed over.
            allowed: a bit for each type that may be.
            properties: that it should have; the last one is dropped where no type has all.
        """
        able = [index for index in range(len(self.types)) if allowed >> index & 1]
        for names in (properties, properties[:-1]):
            wanted = sum(map(constant, names))
            found = [index for index in able if self.types[index].flags & wanted == wanted]
            if found:
                break
        if self.is_shared and tuple(properties) == LOCAL:
            found += [index for index in able if index not in found]
        return [index for index in found if self._has_room(index, nbytes)]

    def _has_room(self, index: int, nbytes: int) -> bool:
        left = self.heaps[self.types[index].heap].left
        return left is None or nbytes <= left


def heaps_of(handle: Any, kind: str, *, budget: bool = False) -> Heaps:
    """Of a VkPhysicalDevice.

    Args:
        budget: ask what is left now; the device has the extension for it.
    """
    now = new("PhysicalDeviceMemoryBudgetPropertiesEXT")
    every = new("PhysicalDeviceMemoryProperties2")
    if budget:
        every = new("PhysicalDeviceMemoryProperties2", pNext=now)
    call("GetPhysicalDeviceMemoryProperties2", handle, every)
    found, local = every.memoryProperties, constant("MEMORY_HEAP_DEVICE_LOCAL_BIT")

    def heap(index: int) -> Heap:
        told = int(now.heapBudget[index])  # 0: the driver fills in nothing
        left = max(told - int(now.heapUsage[index]), 0) if told else None
        one = found.memoryHeaps[index]
        return Heap(int(one.size), bool(one.flags & local), left)

    types = [found.memoryTypes[index] for index in range(found.memoryTypeCount)]
    return Heaps(
        tuple(map(heap, range(found.memoryHeapCount))),
        tuple(MemoryType(int(one.propertyFlags), int(one.heapIndex)) for one in types),
        kind in SHARING,
    )


def largest_allocation(handle: Any) -> int:
    """Bytes that one allocation may have, by what the driver promises."""
    allocations = new("PhysicalDeviceMaintenance3Properties")
    properties = new("PhysicalDeviceProperties2", pNext=allocations)
    call("GetPhysicalDeviceProperties2", handle, properties)
    return int(allocations.maxMemoryAllocationSize)
