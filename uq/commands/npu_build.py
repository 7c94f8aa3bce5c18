"""`uq npu build`: compile a design, or the designs of a bundle, with mlir-aie and Peano."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from uq.commands.npu_arguments import add_command, add_sources
from uq.errors import UsageError

if TYPE_CHECKING:
    from uq.kernels.npu.toolchain.find import Toolchain
    from uq.kernels.npu.toolchain.job import Job
    from uq.kernels.npu.toolchain.steps import Step


def configure(commands: Any) -> None:
    about = "compile a design, or those of a bundle, with mlir-aie and Peano"
    parser = add_command(commands, "build", about, run)
    add = parser.add_argument
    add("design", metavar="FILE.mlir|BUNDLE", type=Path, help="a design, or a bundle with an NPU's")
    add("--device", choices=("npu1", "npu2"), help="of a bundle (default: by its layout)")
    add("-o", "--output", metavar="DIR", type=Path, help="default: the design's name and device")
    add_sources(parser)
    add("--syntax", metavar="V", help="respell the design for mlir-aie 1.0, 1.1 or 2026")
    add("--dry-run", action="store_true", help="print the commands and run none of them")
    add("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    from uq.kernels.npu.source import read_design
    from uq.kernels.npu.toolchain.find import find_toolchain
    from uq.kernels.npu.toolchain.job import prepare

    toolchain = find_toolchain(os.environ, [Path(entry) for entry in sys.path if entry])
    if args.design.is_dir():
        return _build_bundle(args, toolchain)
    if args.device:
        raise UsageError("--device is for bundles; a design says its own")
    job = prepare(
        read_design(args.design),
        name=args.design.stem,
        sources=args.sources or args.design.resolve().parent,
        defines=dict(args.define),
        syntax=args.syntax,
    )
    return _show([job], toolchain, args) if args.dry_run else _build(job, toolchain, args)


def _show(jobs: Sequence[Job], toolchain: Toolchain, args: argparse.Namespace) -> int:
    """The commands of each design; of a bundle's, below its name."""
    from uq.kernels.npu.toolchain.plan import plan
    from uq.kernels.npu.toolchain.run import ask_tools

    if missing := toolchain.missing():
        print(f"not installed: {', '.join(missing)}; assumed as its wheels are", file=sys.stderr)
    asked = ask_tools(toolchain)
    steps = {job.name: plan(job, toolchain.assumed(), asked) for job in jobs}
    if args.json:
        shown = [_commands(job, steps[job.name]) for job in jobs]
        whole = {"designs": shown} if args.design.is_dir() else shown[0]
        print(json.dumps(whole, indent=2))
        return 0
    for name, of_design in steps.items():
        title = [f"# {name}"] if len(jobs) > 1 else []
        print("\n".join([*title, *map(str, of_design)]))
    return 0


def _commands(job: Job, steps: Sequence[Step]) -> dict[str, Any]:
    commands = [{"stage": step.stage, "command": str(step)} for step in steps]
    return {"design": job.name, "device": job.device, "commands": commands}


def _build(job: Job, toolchain: Toolchain, args: argparse.Namespace) -> int:
    from uq.kernels.npu.toolchain.run import build

    out = args.output or Path(f"{job.name}-{job.device}")
    built = build(job, toolchain, out, say=lambda line: print(line, file=sys.stderr))
    if args.json:
        print(json.dumps({"folder": str(out), "cached": built.cached} | dict(built.record)))
    else:
        print(_summary(out, built.record, built.cached))
    return 0


def _build_bundle(args: argparse.Namespace, toolchain: Toolchain) -> int:
    """Carry the designs if the bundle has none; compile them where that is possible."""
    from uq.formats.bundle import open_bundle
    from uq.kernels.npu.toolchain.carried import (
        FOLDER,
        INDEX,
        carried,
        carry,
        compile_carried,
        designs_for,
        device_of,
    )

    if args.output or args.sources or args.define or args.syntax:
        raise UsageError(
            "a bundle takes --device, --dry-run and --json; the rest is for one design"
        )
    bundle = open_bundle(args.design, verify="lazy")
    jobs: list[Job] = []
    if args.device or not (bundle.path / FOLDER / INDEX).is_file():
        layouts = {record.layout for record in bundle.manifest.tensors.values()}
        jobs = list(designs_for(bundle.config, device_of(layouts, args.device)))
    if args.dry_run:
        return _show(jobs or [job for job, _ in carried(bundle.path).values()], toolchain, args)
    if jobs:
        carry(bundle.path, jobs)
        said = f"{bundle.path / FOLDER}: designs for {jobs[0].device}, not compiled"
        print(said, file=sys.stderr)
    names = compile_carried(bundle.path, toolchain, say=lambda line: print(line, file=sys.stderr))
    if args.json:
        print(json.dumps({"folder": str(bundle.path / FOLDER), "compiled": names}))
    else:
        print(f"{bundle.path / FOLDER}: {', '.join(names)}: compiled")
    return 0


def _summary(out: Path, record: Mapping[str, Any], cached: bool) -> str:
    from uq.text import size

    how = "as built before" if cached else f"in {len(record['commands'])} steps"
    files = ", ".join(f"{name} {size(made['size'])}" for name, made in record["files"].items())
    return f"{out}: {files}, for {record['device']}, {how}; how: build.json"
