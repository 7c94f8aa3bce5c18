"""`uq npu lower`: the runtime sequence of a design as the words that an NPU executes."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from uq.commands.npu_arguments import add_command
from uq.errors import UsageError


def configure(commands: Any) -> None:
    about = "write the instructions of a design's runtime sequence"
    parser = add_command(commands, "lower", about, run)
    add = parser.add_argument
    add("design", metavar="FILE.mlir", type=Path, help="aie and aiex dialects")
    default = Path("insts.bin")
    add("-o", "--output", metavar="FILE", type=Path, default=default, help="default: %(default)s")
    add("--sequence", metavar="NAME", help="which one, where the design has several")


def run(args: argparse.Namespace) -> int:
    from uq.kernels.npu.lowering import lower
    from uq.kernels.npu.source import read_design
    from uq.kernels.npu.verify import accepted

    if not args.output.resolve().parent.is_dir():
        raise UsageError(f"{args.output}: there is no folder {args.output.parent}; make it first")
    source = read_design(args.design)
    accepted(source)
    stream = lower(source.module, sequence=args.sequence, source=source)
    data = stream.to_bytes()
    _write(args.output, data)
    print(f"{args.output}: {len(stream.operations)} operations, {len(data) // 4} words")
    return 0


def _write(path: Path, data: bytes) -> None:
    """The whole file, or none."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_bytes(data)
    os.replace(partial, path)
