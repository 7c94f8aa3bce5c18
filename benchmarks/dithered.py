"""A copy of a quantized GGUF model whose weights lie on no grid, as a reference for quantizers.

    llama-quantize --allow-requantize model-Q4_K_M.gguf model-F16.gguf F16
    python -m benchmarks.dithered model-Q4_K_M.gguf model-F16.gguf dithered.gguf
    python -m benchmarks.quality --model dithered.gguf

A model that comes from a file of about 5 bits flatters grids that contain those of the file. Here
every weight is moved by up to half a step of its own block, which takes it off them: a model of
nearly the same distributions of weights as the one that the file was made of, and as lossy to
quantize.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from uq.formats.checkpoint import Checkpoint, open_checkpoint

# Weights of a block that share a step, and the distance of its ends in steps.
BLOCKS = {
    "q4_0": (32, 15), "q4_k": (32, 15), "q5_0": (32, 31), "q5_k": (32, 31),
    "q6_k": (16, 63), "q8_0": (32, 254),
}  # fmt: skip
ROWS = 4096


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in ("source", "f16", "out"):
        parser.add_argument(name, type=Path)
    args = parser.parse_args()
    shutil.copyfile(args.f16, args.out)
    moved = dither(open_checkpoint(args.source), open_checkpoint(args.f16), args.out)
    print(f"{args.out}: {moved} tensors moved off their grids")


def dither(source: Checkpoint, f16: Checkpoint, out: Path) -> int:
    """Move the weights in `out`, a copy of `f16`; how many tensors were moved."""
    rng = np.random.default_rng(0)
    names = [name for name, info in source.tensors.items() if info.dtype in BLOCKS]
    with out.open("r+b") as file:
        for name in names:
            info, (block, steps) = f16.tensors[name], BLOCKS[source.tensors[name].dtype]
            if info.dtype != "f16":
                raise SystemExit(f"{info.where}: {info.dtype}, not f16; make it as --help says")
            file.seek(info.offset)
            for start in range(0, info.shape[0], ROWS):
                rows = source.rows(name, start, min(start + ROWS, info.shape[0]))
                file.write(moved_rows(rows, block, steps, rng).astype("<f2").tobytes())
    return len(names)


def moved_rows(
    rows: NDArray[np.float32], block: int, steps: int, rng: np.random.Generator
) -> NDArray[np.float32]:
    """Each weight (rows, cols) moved by up to half of what `steps` steps span its block with."""
    blocks = rows.reshape(len(rows), -1, block)
    step = np.ptp(blocks, axis=2, keepdims=True) / np.float32(steps)
    noise = rng.random(blocks.shape, np.float32) - np.float32(0.5)
    moved: NDArray[np.float32] = (blocks + noise * step).reshape(rows.shape)
    return moved


if __name__ == "__main__":
    main()
