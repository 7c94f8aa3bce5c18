"""Data-free `uq quantize` beside copying the same bytes and beside `llama-quantize`.

    python -m benchmarks.disk_speed --work FOLDER --llama-quantize PATH 4b --layers 6 --pairs 3

Three things in turn, `--pairs` times, on `--threads` threads with their input in the page cache:

- `uq quantize --method rtn --group 32`: bfloat16 in, INT4 linears and an INT8 embedding out, hashed
  and synced, from the start of the process to its end;
- `cp` of the checkpoint's weights, and writing as many bytes as the bundle has, with fsync;
- `llama-quantize` of the same weights as F16 to Q4_0 (the embedding becomes Q6_K), which leaves its
  output in the page cache; and again with `sync` behind it: uq's bundle is safe when it ends.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter

from benchmarks.random_checkpoint import write_random_checkpoint
from benchmarks.random_gguf import add_vocabulary
from benchmarks.shapes import SHAPES, shape_config
from uq.export.gguf_model import add_model
from uq.formats.checkpoint import Checkpoint, open_checkpoint
from uq.formats.checkpoint.gguf_config import gguf_names
from uq.text import size, table

BLOCK = bytes(16 << 20)


class Contest:
    """The inputs in a folder, and what is timed on them."""

    def __init__(self, work: Path, llama_quantize: Path, threads: int) -> None:
        self.source, self.gguf = work / "checkpoint", work / "f16.gguf"
        self.bundle, self.copy, self.other = work / "bundle", work / "copy", work / "q4_0.gguf"
        self.bundle_bytes = 0
        self._llama_quantize = llama_quantize
        self._threads = str(threads)

    def prepare(self, shape: str, layers: int | None) -> None:
        write_random_checkpoint(shape_config(shape, layers), self.source)
        write_f16(open_checkpoint(self.source), self.gguf)

    def uq(self) -> float:
        command = [sys.executable, "-m", "uq", "quantize", str(self.source), "-o", str(self.bundle)]
        options = ["--method", "rtn", "--group", "32", "--threads", self._threads]
        seconds = timed(lambda: run([*command, *options]), self.source)
        self.bundle_bytes = sum(p.stat().st_size for p in self.bundle.rglob("*") if p.is_file())
        shutil.rmtree(self.bundle)
        return seconds

    def cp(self) -> float:
        """The copy is not synced, the bytes of the bundle are."""

        def work() -> None:
            self.copy.mkdir()
            run(["cp", *map(str, self.source.glob("*.safetensors")), str(self.copy)])
            write_synced(self.copy / "bundle", self.bundle_bytes)

        seconds = timed(work, self.source)
        shutil.rmtree(self.copy)
        return seconds

    def llama(self, *, synced: bool) -> float:
        def work() -> None:
            command = [self._llama_quantize, self.gguf, self.other, "Q4_0", self._threads]
            run([*map(str, command)])
            if synced:
                run(["sync", str(self.other)])

        seconds = timed(work, self.gguf)
        self.other.unlink()
        return seconds


def write_f16(checkpoint: Checkpoint, path: Path) -> None:
    """The checkpoint as GGUF: F16 matrices, F32 gains."""
    config, names = checkpoint.config, gguf_names(checkpoint.config)
    writer = GGUFWriter(path, "gemma3")
    add_model(writer, config)
    add_vocabulary(writer, config)
    kinds = (np.dtype(np.float32), GGMLQuantizationType.F32), (np.dtype(np.float16), None)
    for name, info in checkpoint.tensors.items():
        dtype, kind = kinds[len(info.shape) > 1]
        nbytes = int(np.prod(info.shape)) * dtype.itemsize
        writer.add_tensor_info(names[name], info.shape, dtype, nbytes, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, info in checkpoint.tensors.items():
        values = checkpoint.rows(name, 0, info.shape[0])
        gains = len(info.shape) == 1
        writer.write_tensor_data(values + np.float32(1) if gains else values.astype(np.float16))
    writer.close()


def timed(work: Callable[[], object], warm: Path) -> float:
    """Seconds of `work`, its input in the page cache and no other writes under way."""
    for path in [warm] if warm.is_file() else warm.iterdir():
        run(["cat", str(path)])
    os.sync()
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def run(command: Sequence[str]) -> None:
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def write_synced(path: Path, nbytes: int) -> None:
    with path.open("wb", buffering=0) as file:
        for start in range(0, nbytes, len(BLOCK)):
            file.write(memoryview(BLOCK)[: nbytes - start])
        os.fsync(file.fileno())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("shape", nargs="?", choices=SHAPES, default="4b")
    parser.add_argument("--layers", type=int, help="default: all")
    parser.add_argument("--work", type=Path, required=True, help="new folder on the disk to use")
    parser.add_argument("--llama-quantize", type=Path, required=True)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    args.work.mkdir(parents=True)
    contest = Contest(args.work, args.llama_quantize, args.threads)
    runs: dict[str, Callable[[], float]] = {
        "uq quantize": contest.uq,
        "cp + write, fsync": contest.cp,
        "llama-quantize": lambda: contest.llama(synced=False),
        "llama-quantize, sync": lambda: contest.llama(synced=True),
    }
    took: dict[str, list[float]] = {name: [] for name in runs}
    try:
        contest.prepare(args.shape, args.layers)
        contest.uq()  # compiles
        for _ in range(args.pairs):
            for name, work in runs.items():
                took[name].append(work())
        source = sum(path.stat().st_size for path in contest.source.iterdir())
    finally:
        shutil.rmtree(args.work)
    own = took["uq quantize"]
    print(f"{args.shape}, {args.layers or 'all'} layers: {size(source)} in, ", end="")
    print(f"{size(contest.bundle_bytes)} out, {args.threads} threads")
    rows = []
    for name, seconds in took.items():
        ratios = [other / mine for other, mine in zip(seconds, own, strict=True)]
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
        rows.append((name, f"{median(seconds):.1f} s", f"{median(ratios):.2f}", spread))
    print(table(rows, head=("", "median", "over uq's", "spread")))


if __name__ == "__main__":
    main()
