"""The time of every kernel of a decode step, from the device's own clock."""

from __future__ import annotations

from typing import Any

from uq.kernels.profile import KernelTime
from uq.kernels.vulkan.api import binding, call, constant, create, new
from uq.kernels.vulkan.commands import Recorder
from uq.kernels.vulkan.device import Gpu

MOST_KERNELS = 2048


class TimedRecorder(Recorder):
    """Records a timestamp in front of and behind every dispatch."""

    def __init__(self, gpu: Gpu) -> None:
        super().__init__(gpu)
        info = new(
            "QueryPoolCreateInfo",
            queryType=constant("QUERY_TYPE_TIMESTAMP"),
            queryCount=2 * MOST_KERNELS,
        )
        null = binding().ffi.NULL
        self._queries = create("CreateQueryPool", "VkQueryPool", gpu.device, info, null)
        self._lib.vkCmdResetQueryPool(self.commands, self._queries, 0, 2 * MOST_KERNELS)
        self._labels: list[str] = []

    def dispatch(
        self, pipeline: Any, layout: Any, push: bytes, groups: tuple[int, int, int]
    ) -> None:
        number = 2 * len(self._labels)
        self._stamp(number)
        super().dispatch(pipeline, layout, push, groups)
        self._stamp(number + 1)
        self._labels.append(self.label)

    def times(self) -> list[KernelTime]:
        """Of the last run of this command buffer, which is over."""
        count = 2 * len(self._labels)
        ticks = binding().ffi.new("uint64_t[]", count)
        flags = constant("QUERY_RESULT_64_BIT") | constant("QUERY_RESULT_WAIT_BIT")
        pool, device = self._queries, self._gpu.device
        call("GetQueryPoolResults", device, pool, 0, count, 8 * count, ticks, 8, flags)
        unit = self._gpu.timestamp_period / 1000
        micros = [(tick - ticks[0]) * unit for tick in ticks]
        pairs = zip(self._labels, micros[::2], micros[1::2], strict=True)
        return [KernelTime(label, start, stop - start) for label, start, stop in pairs]

    def close(self) -> None:
        call("DestroyQueryPool", self._gpu.device, self._queries, binding().ffi.NULL)
        super().close()

    def _stamp(self, index: int) -> None:
        stage = constant("PIPELINE_STAGE_COMPUTE_SHADER_BIT")
        self._lib.vkCmdWriteTimestamp(self.commands, stage, self._queries, index)
