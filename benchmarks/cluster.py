"""One machine against workers of Dask: the same bytes, and the wall time of one worker and of two.

    python -m benchmarks.cluster --work FOLDER [--shape 1b] [--layers 8] [--calibrated]

A random checkpoint is rounded to nearest, or its layers are calibrated independently, first by one
thread without a scheduler, then by one and by two workers of one thread each. Workers, scheduler
and writer share this machine, and nothing goes over a wire: the ratio tells what sending costs and
that two workers share the work, not what two machines would reach. Everybody is warm: the
checkpoint was rounded to nearest before. One thread is one of BLAS, too, with
OPENBLAS_NUM_THREADS=1.
"""

from __future__ import annotations

import argparse
import shutil
import time
from pathlib import Path

from distributed import LocalCluster

from benchmarks.random_checkpoint import write_random_checkpoint
from benchmarks.shapes import shape_config
from uq.cluster.cluster import connect
from uq.formats.checkpoint import open_checkpoint
from uq.progress import SilentProgress
from uq.quantize.pipeline import QuantizeOptions, quantize
from uq.text import table

ROUNDED = QuantizeOptions(method="rtn", group=32, threads=1)
CALIBRATED = QuantizeOptions(
    group=32, threads=1, calibration_tokens=1024, calibrate_layers="independently"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--work", type=Path, required=True, help="folder on a disk with room")
    parser.add_argument("--shape", default="1b")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vocabulary", type=int, default=32768)
    parser.add_argument("--calibrated", action="store_true")
    args = parser.parse_args()
    options = CALIBRATED if args.calibrated else ROUNDED
    source, out = args.work / "checkpoint", args.work / "bundle"
    write_random_checkpoint(shape_config(args.shape, args.layers, args.vocabulary), source)
    alone(source, out, ROUNDED)
    seconds, manifest = alone(source, out, options)
    rows = [("no scheduler", f"{seconds:.1f}", "")]
    for count in (1, 2):
        taken, found = with_workers(count, source, out, options)
        same = "same bytes" if found == manifest else "OTHER BYTES"
        rows.append((f"workers: {count}", f"{taken:.1f}", same))
    print(table(rows, head=("", "seconds", "")))
    shutil.rmtree(source)


def alone(source: Path, out: Path, options: QuantizeOptions) -> tuple[float, bytes]:
    """Seconds, and the manifest, which holds the hash of every file."""
    began = time.perf_counter()
    quantize(open_checkpoint(source), out, options)
    return time.perf_counter() - began, taken_away(out)


def with_workers(
    count: int, source: Path, out: Path, options: QuantizeOptions
) -> tuple[float, bytes]:
    found = 0.0, b""
    with LocalCluster(
        n_workers=count, threads_per_worker=1, dashboard_address="127.0.0.1:0"
    ) as cluster:
        for chosen in (ROUNDED, options):
            began = time.perf_counter()
            checkpoint = open_checkpoint(source)
            with connect(cluster.scheduler_address, checkpoint, SilentProgress()) as farm:
                quantize(checkpoint, out, chosen, farm=farm)
            found = time.perf_counter() - began, taken_away(out)
    return found


def taken_away(out: Path) -> bytes:
    manifest = (out / "manifest.json").read_bytes()
    shutil.rmtree(out)
    return manifest


if __name__ == "__main__":
    main()
