"""Times of the kernels of a step: by stage, and as a trace for Perfetto."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class KernelTime:
    """One dispatch: microseconds from the step's begin, and how many it took."""

    label: str
    start: float
    duration: float


@dataclass(frozen=True)
class StepTimes:
    """A decode step: its kernels by the device's clock, and what the host did by its own.

    Both clocks begin with the step; how far they are apart is not known.
    """

    kernels: list[KernelTime]
    host: list[KernelTime]


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


def chrome_trace(step: StepTimes) -> str:
    """A step in the format of chrome://tracing and Perfetto: a row of the GPU, one of the host."""
    rows = (("GPU", step.kernels), ("host", step.host))
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
