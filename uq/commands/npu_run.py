"""`uq npu run`: run a design on arrays, on an NPU or in the functional emulator."""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from uq.commands.arguments import whole
from uq.commands.npu_arguments import add_command, add_sources
from uq.errors import UsageError

if TYPE_CHECKING:
    from numpy.typing import NDArray

DEVICES = ("npu", "npu-emulator")


def configure(commands: Any) -> None:
    about = "run a design once, on arrays of numpy"
    parser = add_command(commands, "run", about, run)
    add = parser.add_argument
    add(
        "design",
        metavar="DIR|FILE.mlir",
        type=Path,
        help="a folder of uq npu build; for the emulator a design",
    )
    add("--device", choices=DEVICES, default="npu", help="default: %(default)s")
    add(
        "--input",
        metavar="FILE.npy",
        type=Path,
        action="append",
        default=[],
        help="the buffers of the design in their order; those left out are random bytes",
    )
    add("--output", metavar="DIR", type=Path, help="write all buffers there afterwards")
    add_sources(parser)
    add("--seed", type=whole(0), default=0, metavar="N", help="of the random bytes (default 0)")
    add("--timeout", type=whole(1), default=10_000, metavar="MS", help="default: %(default)s")
    add("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    on = _on_emulator if args.device == "npu-emulator" else _on_npu
    name, before, after = on(args)
    rows = list(_rows(before, after))
    if args.json:
        print(json.dumps({"device": name, "buffers": rows}, indent=2))
    else:
        print(_describe(name, rows))
    if args.output:
        _write(args.output, after)
    return 0


def _on_npu(args: argparse.Namespace) -> tuple[str, list[Any], list[Any]]:
    from uq.kernels.npu.runtime.npu import Npu, load_pyxrt
    from uq.kernels.npu.runtime.program import buffers_of, read_program, refuse_raw_kernel

    if args.design.is_file():
        refuse_raw_kernel(args.design.read_bytes(), args.design)
    if not args.design.is_dir():
        raise UsageError(f"{args.design}: an NPU runs a folder made by uq npu build")
    program = read_program(args.design)
    arrays = _arrays(args, buffers_of(args.design))
    before = [array.copy() for array in arrays]
    npu = Npu(load_pyxrt())
    with npu.open(program) as opened:
        opened.run(arrays, timeout=args.timeout)
    return npu.name, before, arrays


def _on_emulator(args: argparse.Namespace) -> tuple[str, list[Any], list[Any]]:
    from uq.kernels.npu.runtime.emulated import emulated_npu
    from uq.kernels.npu.source import read_design
    from uq.kernels.npu.toolchain.job import prepare

    if args.design.is_dir():
        raise UsageError(f"{args.design}: the emulator runs a design, FILE.mlir")
    folder = args.sources or args.design.resolve().parent
    job = prepare(
        read_design(args.design), name=args.design.stem, sources=folder, defines=dict(args.define)
    )
    npu, emulator = emulated_npu(job.device.partition("_")[0])
    arrays = _arrays(args, job.buffers)
    before = [array.copy() for array in arrays]
    with (
        tempfile.TemporaryDirectory() as made,
        npu.open(emulator.program(job, Path(made))) as opened,
    ):
        opened.run(arrays, timeout=args.timeout)
    return f"{npu.name}, which has no clock", before, arrays


def _arrays(args: argparse.Namespace, sizes: Sequence[int]) -> list[NDArray[Any]]:
    """One array for each buffer: what was given, then random bytes."""
    import numpy as np

    if len(args.input) > len(sizes):
        raise UsageError(f"{len(args.input)} inputs for a design of {len(sizes)} buffers")
    given = [_load(path, size) for path, size in zip(args.input, sizes, strict=False)]
    random = np.random.default_rng(args.seed)
    rest = sizes[len(given) :]
    return given + [random.integers(0, 256, size, dtype=np.uint8) for size in rest]


def _load(path: Path, size: int) -> NDArray[Any]:
    import numpy as np

    try:
        array: NDArray[Any] = np.load(path, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise UsageError(f"--input {path}: is no .npy file of numbers") from error
    if array.nbytes != size:
        raise UsageError(f"--input {path}: has {array.nbytes:,} bytes; its buffer has {size:,}")
    return np.ascontiguousarray(array)


def _rows(before: Sequence[Any], after: Sequence[Any]) -> Iterator[dict[str, Any]]:
    """What became of each buffer."""
    contents = [array.tobytes() for array in after]
    for index, (old, new) in enumerate(zip(before, contents, strict=True)):
        twins = [other for other in range(index) if contents[other] == new]
        yield {
            "buffer": index,
            "bytes": len(new),
            "written": old.tobytes() != new,
            "equals": twins[0] if twins else None,
        }


def _describe(name: str, rows: Sequence[dict[str, Any]]) -> str:
    lines = [f"ran on {name}"]
    for row in rows:
        what = "written" if row["written"] else "as it was"
        twin = f", equals buffer {row['equals']}" if row["equals"] is not None else ""
        lines.append(f"buffer {row['buffer']}: {row['bytes']:,} bytes, {what}{twin}")
    return "\n".join(lines)


def _write(folder: Path, arrays: Sequence[Any]) -> None:
    import numpy as np

    folder.mkdir(parents=True, exist_ok=True)
    for index, array in enumerate(arrays):
        np.save(folder / f"buffer{index}.npy", array)
