"""Products of one token alone, every shape of workgroup, beside the bandwidth of the same run.

    python -m benchmarks.vulkan_products 65536x5376 5376x21504 [--bits 4] [--device NAME]

Each dispatch reads another part of memory, so that no cache helps. All weights are zeros: the time
is that of any others.
"""

from __future__ import annotations

import argparse
import tempfile
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from uq.formats.spec import BITS, GROUPS, Spec
from uq.kernels.vulkan.bandwidth import read_bandwidth
from uq.kernels.vulkan.commands import Submission
from uq.kernels.vulkan.device import Gpu, choose
from uq.kernels.vulkan.memory import Arena, Span, Transfers
from uq.kernels.vulkan.pipelines import Pipelines
from uq.kernels.vulkan.profile import ClockedRecorder
from uq.kernels.vulkan.push import addresses, words
from uq.kernels.vulkan.state import STATE_BYTES
from uq.kernels.vulkan.tuning import BRANCH, MOST_LANES, Shape, Tuning, candidates
from uq.kernels.vulkan.weights import Kind, Matrix, tiles_of

DISPATCHES, REPEATS = 16, 3
UNCACHED = 1 << 28  # bytes of weights, at least
SHOWN = 3  # shapes of a product


class Together(ClockedRecorder):
    """Times all of its dispatches as one."""

    def __init__(self, gpu: Gpu) -> None:
        super().__init__(gpu, 2)
        self.stamp()

    def dispatch(
        self, pipeline: Any, layout: Any, push: bytes, groups: tuple[int, int, int]
    ) -> None:
        super().dispatch(pipeline, layout, push, groups)
        self.barrier()

    def end(self) -> None:
        self.stamp()
        super().end()


@dataclass(frozen=True)
class Bench:
    """A device, and memory: for weights, and for all that a product reads and writes besides."""

    gpu: Gpu
    pipelines: Pipelines
    weights: Span
    rest: Span

    def microseconds(self, kind: Kind, rows: int, cols: int, shape: Shape) -> float:
        """Of a dispatch and the barrier behind it, the best of `REPEATS`."""
        tuning = Tuning(self.gpu.physical.has("shaderIntegerDotProduct"))
        sizes = {"LANES": shape.lanes, "BLOCKS": shape.blocks, "EPILOGUE": BRANCH}
        pipeline = self.pipelines.get(tuning.kernel(kind), **kind.constants, **sizes)
        nbytes, blocks = kind.tiled_bytes(rows, cols), -(-rows // 16)
        places = self.weights.nbytes // nbytes
        recorder = Together(self.gpu)
        for number in range(DISPATCHES):
            weight = self.weights.part(number % places * nbytes, nbytes)
            push = addresses(weight, weight, *[self.rest] * 8)
            push += words(blocks, tiles_of(cols), rows, rows, 0)
            groups = -(-blocks // shape.blocks), shape.parts, 1
            recorder.dispatch(pipeline, self.pipelines.layout, push, groups)
        recorder.end()
        submission, times = Submission(self.gpu, [recorder.commands]), []
        for _ in range(REPEATS):
            submission.run()
            times.append(recorder.micros()[1] / DISPATCHES)
        submission.close()
        recorder.close()
        return min(times)

    def show(self, kind: Kind, rows: int, cols: int, bandwidth: float) -> None:
        nbytes = kind.tiled_bytes(rows, cols)
        matrix = Matrix(kind, rows, cols, self.weights, nbytes)
        lanes = min(self.gpu.physical.most_lanes, MOST_LANES)
        shapes = candidates(matrix, BRANCH, lanes)
        times = {shape: self.microseconds(kind, rows, cols, shape) for shape in shapes}
        print(f"{rows} x {cols} {kind.spec}: {1e6 * nbytes / bandwidth:.1f} us at the bandwidth")
        for shape in sorted(times, key=times.__getitem__)[:SHOWN]:
            share = nbytes / times[shape] / bandwidth * 1e6
            print(f"  {times[shape]:.1f} us, {share:.0%}: {shape}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("sizes", nargs="+", metavar="ROWSxCOLS")
    parser.add_argument("--bits", type=int, choices=BITS, default=4)
    parser.add_argument("--group", type=int, choices=GROUPS, default=32)
    parser.add_argument("--scale-bits", type=int, choices=(8, 16), default=8)
    parser.add_argument("--device", default="", help="number or part of the name")
    args = parser.parse_args()
    kind = Kind.of(Spec(args.bits, args.group, scale_bits=args.scale_bits))
    sizes = [tuple(map(int, size.split("x"))) for size in args.sizes]
    physical, cache = choose(args.device), Path(tempfile.gettempdir()) / "uq-vulkan"
    bandwidth = read_bandwidth(physical, cache)
    print(f"{physical.name}: {bandwidth / 1e9:.0f} GB/s")
    room = max(UNCACHED, *(2 * kind.tiled_bytes(rows, cols) for rows, cols in sizes))
    outputs = max(4 * 8 * rows + 4 * 128 * tiles_of(cols) for rows, cols in sizes) + STATE_BYTES
    with ExitStack() as stack:
        gpu = stack.enter_context(closing(Gpu(physical)))
        pipelines = stack.enter_context(closing(Pipelines(gpu, cache)))
        arena = stack.enter_context(closing(Arena(gpu, room + outputs)))
        transfers = stack.enter_context(closing(Transfers(gpu)))
        weights, rest = arena.take(room), arena.take(outputs)
        for span in (weights, rest):
            transfers.fill(span)
        bench = Bench(gpu, pipelines, weights, rest)
        for rows, cols in sizes:
            bench.show(kind, rows, cols, bandwidth)


if __name__ == "__main__":
    main()
