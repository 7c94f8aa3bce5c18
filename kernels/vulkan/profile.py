"""The time of every kernel of a decode step, from the device's own clock."""

from __future__ import annotations

from typing import Any

from uq.kernels.profile import KernelTime
from uq.kernels.vulkan.api import binding, call, constant, create, new
from uq.kernels.vulkan.commands import Recorder
from uq.kernels.vulkan.device import Gpu

MOST_KERNELS = 2048


class ClockedRecorder(Recorder):
    """Records times of the device's clock."""

    def __init__(self, gpu: Gpu, most: int) -> None:
        """`most`: times."""
        super().__init__(gpu)
        kind = constant("QUERY_TYPE_TIMESTAMP")
        info = new("QueryPoolCreateInfo", queryType=kind, queryCount=most)
        null = binding().ffi.NULL
        self._queries = create("CreateQueryPool", "VkQueryPool", gpu.device, info, null)
        self._lib.vkCmdResetQueryPool(self.commands, self._queries, 0, most)
        self._stamps = 0

    def stamp(self) -> None:
        """Record when all that was recorded is over."""
        stage = constant("PIPELINE_STAGE_COMPUTE_SHADER_BIT")
        self._lib.vkCmdWriteTimestamp(self.commands, stage, self._queries, self._stamps)
        self._stamps += 1

    def micros(self) -> list[float]:
        """Stamps of the last run of this command buffer, which is over, from the first on."""
        ticks = binding().ffi.new("uint64_t[]", self._stamps)
        flags = constant("QUERY_RESULT_64_BIT") | constant("QUERY_RESULT_WAIT_BIT")
        pool, device, size = self._queries, self._gpu.device, 8 * self._stamps
        call("GetQueryPoolResults", device, pool, 0, self._stamps, size, ticks, 8, flags)
        unit = self._gpu.timestamp_period / 1000
        return [(tick - ticks[0]) * unit for tick in ticks]

    def close(self) -> None:
        call("DestroyQueryPool", self._gpu.device, self._queries, binding().ffi.NULL)
        super().close()


class TimedRecorder(ClockedRecorder):
    """Records a timestamp in front of and behind every dispatch."""

    def __init__(self, gpu: Gpu) -> None:
        super().__init__(gpu, 2 * MOST_KERNELS)
        self._labels: list[str] = []

    def dispatch(
        self, pipeline: Any, layout: Any, push: bytes, groups: tuple[int, int, int]
    ) -> None:
        self.stamp()
        super().dispatch(pipeline, layout, push, groups)
        self.stamp()
        self._labels.append(self.label)

    def times(self) -> list[KernelTime]:
        """Of the last run of this command buffer, which is over."""
        micros = self.micros()
        pairs = zip(self._labels, micros[::2], micros[1::2], strict=True)
        return [KernelTime(label, start, stop - start) for label, start, stop in pairs]
