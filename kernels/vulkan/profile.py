"""The time of every kernel of a decode step, from the device's own clock."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from uq.kernels.vulkan.api import binding, call, constant, create, new
from uq.kernels.vulkan.commands import Recorder
from uq.kernels.vulkan.device import Gpu

MOST_KERNELS = 2048


@dataclass(frozen=True)
class KernelTime:
    """One dispatch: microseconds from the step's begin, and how many it took."""

    label: str
    start: float
    duration: float


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


@dataclass(frozen=True)
class StageTime:
    """All dispatches of one label in a step: microseconds, their share of the step, how many."""

    label: str
    microseconds: float
    share: float
    dispatches: int


def by_label(times: Sequence[KernelTime]) -> list[StageTime]:
    """The slowest first. The rest, up to the step's whole time, is between the dispatches."""
    whole = times[-1].start + times[-1].duration
    found = []
    for label in dict.fromkeys(time.label for time in times):
        spent = [time.duration for time in times if time.label == label]
        found.append(StageTime(label, sum(spent), sum(spent) / whole, len(spent)))
    idle = whole - sum(stage.microseconds for stage in found)
    found.sort(key=lambda stage: -stage.microseconds)
    return [*found, StageTime("between dispatches", idle, idle / whole, 0)]


def chrome_trace(times: Sequence[KernelTime], host: Sequence[KernelTime] = ()) -> str:
    """A step in the format of chrome://tracing and Perfetto: a row of the GPU, one of the host."""
    rows = (("GPU", times), ("host", host))
    events = [
        {
            "name": time.label,
            "ph": "X",
            "ts": time.start,
            "dur": time.duration,
            "pid": 1,
            "tid": row,
        }
        for row, part in rows
        for time in part
    ]
    return json.dumps({"traceEvents": events, "displayTimeUnit": "ns"})
