"""A device that calibrates, and all that works on it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from uq.kernels.vulkan.dense.cells import Cells
from uq.kernels.vulkan.dense.matrix import Store
from uq.kernels.vulkan.dense.products import Products
from uq.kernels.vulkan.dense.stream import Stream
from uq.kernels.vulkan.device import Gpu, PhysicalGpu
from uq.kernels.vulkan.memory import Arena, Transfers
from uq.kernels.vulkan.pipelines import Pipelines


@dataclass(frozen=True)
class Workshop:
    """A device and all that works on it."""

    gpu: Gpu
    arena: Arena
    transfers: Transfers
    pipelines: Pipelines
    stream: Stream
    store: Store
    products: Products
    cells: Cells

    @classmethod
    def open(cls, physical: PhysicalGpu, pipeline_cache: Path, *, timed: bool = False) -> Workshop:
        """Raises DeviceError: the device fails."""
        gpu = Gpu(physical)
        arena, transfers = Arena(gpu, 0), Transfers(gpu)
        pipelines = Pipelines(gpu, pipeline_cache)
        stream = Stream(gpu, pipelines, transfers, timed=timed)
        store = Store(stream, arena)
        return cls(gpu, arena, transfers, pipelines, stream, store, Products(stream), Cells(stream))

    @property
    def tools(self) -> tuple[Stream, Store, Products, Cells]:
        return self.stream, self.store, self.products, self.cells

    def close(self) -> None:
        self.stream.wait()
        for part in (self.pipelines, self.transfers, self.arena, self.gpu):
            part.close()
