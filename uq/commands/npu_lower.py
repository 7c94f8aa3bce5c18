"""`uq npu lower`: the runtime sequence of a design as the words that an NPU executes."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from uq.commands.npu_arguments import add_command


def configure(commands: Any) -> None:
    about = "write the instructions of a design's runtime sequence"
    parser = add_command(commands, "lower", about, run)
    parser.add_argument("design", metavar="FILE.mlir", type=Path, help="aie and aiex dialects")
    parser.add_argument(
        "-o", "--output", metavar="FILE", type=Path, default=Path("insts.bin"),
        help="default: %(default)s",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    from uq.kernels.npu.lowering import lower
    from uq.kernels.npu.source import read_design

    stream = lower(read_design(args.design).module)
    data = stream.to_bytes()
    args.output.write_bytes(data)
    print(f"{args.output}: {len(stream.operations)} operations, {len(data) // 4} words")
    return 0
