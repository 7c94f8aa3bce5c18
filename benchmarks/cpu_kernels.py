"""The CPU kernels alone: decoding beside the read bandwidth, prefill beside sgemm.

    python benchmarks/cpu_kernels.py [--threads 2] [--repeats 20]

Weights are random and too large together for any cache. Each figure is the best of the repeats, so
that a busy machine shows less.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import numba
import numpy as np
from numpy.typing import NDArray

from uq.formats.layouts import LAYOUTS
from uq.formats.row_scales import round_scales
from uq.formats.spec import SPECS, QuantTensor, Spec
from uq.kernels.cpu.elementwise import Activations, quantize_rows
from uq.kernels.cpu.gemm import gemm, gemm_scratch
from uq.kernels.cpu.gemv import gemv
from uq.kernels.cpu.layout import Arena, WeightSource, pack
from uq.validate.bandwidth import measure_bandwidth

TOKENS = 512
COLD_BYTES = 300e6  # of weights that one pass of decoding walks through
SHAPES = {
    "270m qkv": (1536, 640, Spec(4, 64)),
    "270m gate, up": (4096, 640, Spec(4, 64)),
    "270m down": (640, 2048, Spec(4, 64)),
    "270m gate, up by 32": (4096, 640, Spec(4, 32)),
    "270m head": (262144, 640, Spec(8, 64)),
    "270m head in 6 bits": (262144, 640, Spec(6, 32)),
    "4b gate, up": (20480, 2560, Spec(4, 64)),
    "4b down": (2560, 10240, Spec(4, 128)),
} | {
    f"4b gate, up, {spec}": (20480, 2560, spec)
    for grid in SPECS
    for spec in (grid, replace(grid, scale_bits=8))
    if grid.group < 128
}


@dataclass(frozen=True)
class Record:
    shape: tuple[int, int]
    spec: Spec
    layout: str = "igpu"


@dataclass(frozen=True)
class Repeated(WeightSource):
    """One random weight under any name."""

    tiled: NDArray[np.uint8]
    record: Record

    def raw(self, name: str) -> tuple[NDArray[np.uint8], Record]:
        return self.tiled, self.record

    def array(self, name: str) -> NDArray[np.float32]:
        raise KeyError(name)


def random_source(rows: int, cols: int, spec: Spec) -> Repeated:
    rng = np.random.default_rng(0)
    codes = rng.integers(spec.qmin, spec.qmax + 1, (rows, cols), dtype=np.int8)
    groups = (rows, cols // spec.group)
    zeros = rng.integers(-8, 8, groups, dtype=np.int8) * np.int8(spec.zero_step)
    scales = rng.random(groups).astype("f2")
    scales = round_scales(scales) if spec.row_step else scales
    tensor = QuantTensor(codes, scales, spec, zeros if spec.zero_point else None)
    tiled = LAYOUTS["igpu"].tile(tensor)
    return Repeated(tiled, Record((rows, cols), spec))


def quantized(tokens: int, cols: int) -> Activations:
    x = Activations.empty(tokens, cols)
    values = np.random.default_rng(1).standard_normal((tokens, cols)).astype(np.float32)
    quantize_rows(values, *x.arrays)
    return x


def seconds(work: Callable[[], object], repeats: int) -> float:
    """Best of the repeats, behind one run that compiles."""
    work()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def decoding(arena: Arena, x: Activations, repeats: int) -> float:
    """GB/s of `gemv` over every copy of the weight in the arena."""
    linears = list(arena.linears.values())
    out = np.empty((1, linears[0].width), np.float32)

    def run() -> None:
        for linear in linears:
            gemv(arena.data, linear.parts, *x.arrays, out)

    return sum(linear.nbytes for linear in linears) / seconds(run, repeats) / 1e9


def prefill(arena: Arena, x: Activations, threads: int, repeats: int) -> float:
    """GFLOP/s of `gemm`."""
    linear = next(iter(arena.linears.values()))
    out = np.empty((TOKENS, linear.width), np.float32)
    scratch = np.empty((threads, gemm_scratch(TOKENS)), np.float32)
    time_of = seconds(
        lambda: gemm(arena.data, linear.parts, x.codes, x.scales, out, scratch), repeats
    )
    return 2 * TOKENS * linear.cols * linear.width / time_of / 1e9


def sgemm(rows: int, cols: int, repeats: int) -> float:
    """GFLOP/s of numpy's BLAS on the same product, its weight in float32 already."""
    rng = np.random.default_rng(0)
    x, w = (rng.random((n, cols), np.float32) for n in (TOKENS, rows))
    return 2 * TOKENS * cols * rows / seconds(lambda: x @ w.T, repeats) / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=numba.config.NUMBA_NUM_THREADS)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--only", default="", help="weights whose name contains this")
    args = parser.parse_args()
    numba.set_num_threads(args.threads)
    print(f"read bandwidth {measure_bandwidth().best:.1f} GB/s, {args.threads} threads\n")
    print("| weight | rows x cols | format | decode GB/s | prefill GFLOP/s | sgemm GFLOP/s |")
    print("|---|---|---|---|---|---|")
    for name, (rows, cols, spec) in SHAPES.items():
        if args.only not in name:
            continue
        source = random_source(rows, cols, spec)
        copies = max(1, int(COLD_BYTES / spec.nbytes(rows, cols)))
        arena = pack(source, {str(copy): [str(copy)] for copy in range(copies)})
        rates = [decoding(arena, quantized(1, cols), args.repeats)]
        few = max(2, args.repeats // 4) if rows * cols > 1e7 else args.repeats
        rates.append(prefill(arena, quantized(TOKENS, cols), args.threads, few))
        rates.append(sgemm(rows, cols, few))
        figures = " | ".join(f"{rate:.1f}" for rate in rates)
        print(f"| {name} | {rows} x {cols} | {spec} | {figures} |", flush=True)


if __name__ == "__main__":
    main()
