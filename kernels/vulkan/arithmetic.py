"""How fast a device multiplies and adds: the ceiling that prompts are held against."""

from __future__ import annotations

import struct
import time
from pathlib import Path

from uq.kernels.session import Arithmetic
from uq.kernels.vulkan.commands import Recorder, Submission
from uq.kernels.vulkan.device import Gpu, PhysicalGpu
from uq.kernels.vulkan.memory import Arena, Span
from uq.kernels.vulkan.pipelines import Pipelines
from uq.kernels.vulkan.push import addresses, words
from uq.kernels.vulkan.variants import VARIANTS

LANES = 256
GROUPS = {"cpu": 16}
USUAL_GROUPS = 4096
LONG_ENOUGH = 0.02  # seconds of a run that counts; starting it takes 50 microseconds
REPEATS = 3
FACTOR = 0.5
# Operations of a lane in one round of shaders/arithmetic.comp; those of MATRIX are a subgroup's.
LANE_OPERATIONS = {"arithmetic": 8 * 4 * 2, "arithmetic_dot": 16 * 4 * 2}
MATRIX, MATRIX_OPERATIONS = "arithmetic_matrix", 4 * 16**3 * 2
NAMES = {
    "arithmetic": "float32",
    "arithmetic_dot": "integer dot product",
    MATRIX: "cooperative matrix",
}


def arithmetic_of(product: str) -> str:
    """The module that measures what the GEMM `product` is made of."""
    if product.endswith("_matrix"):
        return MATRIX
    return "arithmetic_dot" if product.endswith("_dot") else "arithmetic"


def measure(physical: PhysicalGpu, pipeline_cache: Path, module: str) -> Arithmetic:
    """The best of 3 runs of at least 20 ms.

    Raises:
        DeviceError: the device fails.
    """
    gpu = Gpu(physical)
    groups = GROUPS.get(physical.kind, USUAL_GROUPS)
    arena, pipelines = Arena(gpu, 4 * LANES * groups), Pipelines(gpu, pipeline_cache)
    try:
        sums, rounds = arena.take(4 * LANES * groups), 64
        while run(gpu, pipelines, module, sums, rounds) < LONG_ENOUGH:
            rounds *= 2
        seconds = min(run(gpu, pipelines, module, sums, rounds) for _ in range(REPEATS))
        rate = operations(physical, module) * rounds * groups * LANES / seconds
        return Arithmetic(NAMES[module], rate)
    finally:
        for part in (pipelines, arena, gpu):
            part.close()


def operations(physical: PhysicalGpu, module: str) -> float:
    """Of a lane in one round: a product and a sum are two."""
    lanes = physical.lanes(VARIANTS[module].subgroup)
    return MATRIX_OPERATIONS / lanes if module == MATRIX else LANE_OPERATIONS[module]


def run(gpu: Gpu, pipelines: Pipelines, module: str, sums: Span, rounds: int) -> float:
    """Seconds of a submit whose invocations write to `sums`."""
    recorder = Recorder(gpu)
    pipeline = pipelines.get(module, LANES=LANES)
    push = addresses(sums) + words(rounds) + struct.pack("<f", FACTOR)
    recorder.dispatch(pipeline, pipelines.layout, push, (sums.nbytes // 4 // LANES, 1, 1))
    recorder.end()
    submission = Submission(gpu, [recorder.commands])
    began = time.perf_counter()
    submission.run()
    seconds = time.perf_counter() - began
    submission.close()
    recorder.close()
    return seconds
