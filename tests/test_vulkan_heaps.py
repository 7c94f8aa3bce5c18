"""Which memory a buffer goes into, by layouts that drivers have."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from uq.errors import DeviceError
from uq.kernels.vulkan.api import constant, create
from uq.kernels.vulkan.device import Gpu, choose
from uq.kernels.vulkan.heaps import LOCAL, Heap, Heaps, MemoryType
from uq.kernels.vulkan.memory import CACHED, HOST, Slab

GIB = 1 << 30
ALL = 0xFF
IS_LOCAL, VISIBLE, COHERENT, IS_CACHED = (
    constant(f"MEMORY_PROPERTY_{name}_BIT")
    for name in ("DEVICE_LOCAL", "HOST_VISIBLE", "HOST_COHERENT", "HOST_CACHED")
)
# RADV on an APU with 16 GiB that both may use: two thirds are said to be local.
RADV = Heaps(
    (Heap(5 * GIB, False), Heap(11 * GIB, True)),
    (
        MemoryType(IS_LOCAL, 1),
        MemoryType(VISIBLE | COHERENT, 0),
        MemoryType(IS_LOCAL | VISIBLE | COHERENT, 1),
        MemoryType(VISIBLE | COHERENT | IS_CACHED, 0),
    ),
    is_shared=True,
)
DISCRETE = replace(RADV, is_shared=False)


def left(heaps: Heaps, *nbytes: int | None) -> Heaps:
    told = [replace(heap, left=room) for heap, room in zip(heaps.heaps, nbytes, strict=True)]
    return replace(heaps, heaps=tuple(told))


def test_a_model_may_take_all_memory_that_is_the_hosts() -> None:
    assert (RADV.nbytes, DISCRETE.nbytes) == (16 * GIB, 11 * GIB)


def test_what_is_not_local_comes_last_and_only_where_memory_is_shared() -> None:
    assert RADV.fitting(GIB, ALL, LOCAL) == [0, 2, 1, 3]
    assert DISCRETE.fitting(GIB, ALL, LOCAL) == [0, 2]


def test_a_full_heap_is_passed_over() -> None:
    assert left(RADV, 2 * GIB, GIB // 2).fitting(GIB, ALL, LOCAL) == [1, 3]
    assert left(RADV, None, GIB // 2).fitting(GIB, ALL, LOCAL) == [1, 3]
    assert left(DISCRETE, 2 * GIB, GIB // 2).fitting(GIB, ALL, LOCAL) == []


def test_types_that_the_buffer_may_not_have_are_left_out() -> None:
    assert RADV.fitting(GIB, 0b1010, LOCAL) == [1, 3]


def test_what_the_host_reads_is_cached_where_that_is_possible() -> None:
    assert RADV.fitting(GIB, ALL, CACHED) == [3]
    assert RADV.fitting(GIB, 0b0111, CACHED) == [1, 2]
    assert RADV.fitting(GIB, ALL, HOST) == [1, 2, 3]


def test_what_the_driver_gives_not_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is asked first: some give more at once than they promise."""

    def refuse(function: str, *arguments: Any) -> Any:
        if function == "AllocateMemory":
            raise DeviceError("out of device memory")
        return create(function, *arguments)

    monkeypatch.setattr("uq.kernels.vulkan.memory.create", refuse)
    gpu = Gpu(replace(choose()))
    for most, message in (
        (GIB // 4, r"0\.5 GiB are needed at once, its driver gives 0\.2; use fewer bits"),
        (GIB, r"has no 512 MiB left of its \d+\.\d GiB; close other programs"),
    ):
        gpu.physical.__dict__["largest_allocation"] = most
        with pytest.raises(DeviceError, match=message):
            Slab(gpu, GIB // 2, LOCAL)
    gpu.close()
