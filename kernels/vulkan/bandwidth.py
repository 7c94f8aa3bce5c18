"""How fast a device reads its memory: the ceiling that decoding is held against."""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path

from uq.errors import DeviceError
from uq.kernels.vulkan.commands import Recorder, Submission
from uq.kernels.vulkan.device import Gpu, PhysicalGpu
from uq.kernels.vulkan.memory import Arena, Span, Transfers
from uq.kernels.vulkan.pipelines import Pipelines
from uq.kernels.vulkan.push import addresses, words

LANES, GROUPS = 256, 4096
UNIT = 16 * 4 * LANES * GROUPS  # bytes that all invocations read in one round
LARGEST = 1 << 30
REPEATS = 5


def read_bandwidth(physical: PhysicalGpu, pipeline_cache: Path) -> float:
    """Bytes per second of 16-byte reads of up to 1 GiB (64 MiB on a CPU); the best of 5.

    Less than 1 GiB where a model has left no more.

    Raises:
        DeviceError: the device fails, or has no such memory left.
    """
    gpu = Gpu(physical)
    largest = UNIT if physical.kind == "cpu" else LARGEST
    size = max(min(largest, physical.memory // 4) // UNIT, 1) * UNIT
    arena, transfers = Arena(gpu, UNIT), Transfers(gpu)
    pipelines = Pipelines(gpu, pipeline_cache)
    try:
        data, sums = _take(arena, size), arena.take(4 * LANES * GROUPS)
        transfers.fill(data)  # so that all of it is there
        return max(_measure(gpu, pipelines, data, sums) for _ in range(REPEATS))
    finally:
        for part in (pipelines, transfers, arena, gpu):
            part.close()


def _take(arena: Arena, size: int) -> Span:
    """`size` bytes, or half of it, or half of that, and so on."""
    while size > UNIT:
        with suppress(DeviceError):
            return arena.take(size)
        size = size // UNIT // 2 * UNIT
    return arena.take(UNIT)


def _measure(gpu: Gpu, pipelines: Pipelines, data: Span, sums: Span) -> float:
    """Many rounds in one submit, so that the start of one does not count."""
    rounds = 1 if gpu.physical.kind == "cpu" else 8
    recorder = Recorder(gpu)
    push = addresses(data, sums) + words(data.nbytes // 16)
    for _ in range(rounds):
        pipeline = pipelines.get("read", LANES=LANES)
        recorder.dispatch(pipeline, pipelines.layout, push, (GROUPS, 1, 1))
        recorder.barrier()
    recorder.end()
    submission = Submission(gpu, [recorder.commands])
    submission.run()
    began = time.perf_counter()
    submission.run()
    seconds = time.perf_counter() - began
    submission.close()
    recorder.close()
    return rounds * data.nbytes / seconds
