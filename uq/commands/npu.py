"""`uq npu`: work on designs for the NPU. `uq npu verify` checks one against the array."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from uq.commands import npu_build, npu_lower, npu_run
from uq.commands.arguments import whole
from uq.commands.npu_arguments import add_command
from uq.errors import ToolMissing

if TYPE_CHECKING:
    from uq.kernels.npu.verify import Report


def configure(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    about = "check a design in MLIR against the limits of the NPU"
    verify = add_command(commands, "verify", about, run_verify)
    verify.add_argument("design", metavar="FILE.mlir", type=Path, help="aie and aiex dialects")
    verify.add_argument(
        "--device",
        metavar="D",
        help="check for this device, such as npu1 or npu2, in place of the one in the file",
    )
    verify.add_argument(
        "--reserve",
        metavar="BYTES",
        type=whole(0),
        default=0,
        help="memory of every core that tables and constants of its kernels take (default 0)",
    )
    verify.add_argument("--json", action="store_true", help="print one JSON object")
    npu_build.configure(commands)
    npu_lower.configure(commands)
    npu_run.configure(commands)


def run(args: argparse.Namespace) -> int:
    with _xdsl():
        code: int = args.npu(args)
    return code


@contextmanager
def _xdsl() -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "xdsl":
            raise
        advice = "run: pip install 'unicorn-quant[npu]'"
        raise ToolMissing(f"uq npu needs the package xdsl; {advice}") from None


def run_verify(args: argparse.Namespace) -> int:
    """0 when no error is found; warnings alone do not fail."""
    from uq.kernels.npu.source import read_design
    from uq.kernels.npu.verify import verify

    reports = verify(read_design(args.design), device=args.device, reserved=args.reserve)
    if args.json:
        print(json.dumps(summary(args.design, reports), indent=2))
    else:
        print("\n\n".join(describe(args.design, report) for report in reports))
    return 0 if all(report.accepted for report in reports) else 1


def describe(design: Path, report: Report) -> str:
    """One line per finding, what every tile takes, and the verdict."""
    from uq.text import table

    lines = [
        f"{design}:{finding.line}: {finding.severity}: {finding.rule}: "
        f"{finding.message} [{finding.source}]"
        for finding in report.findings
    ]
    head = ("tile", "kind", "buffers", "bytes", "of", "BDs", "of", "locks", "of", "S2MM", "MM2S")
    rows = list(_rows(report))
    if rows:
        lines += ["", table(rows, head=head), ""] if lines else [table(rows, head=head), ""]
    errors = sum(finding.severity == "error" for finding in report.findings)
    warnings = len(report.findings) - errors
    verdict = "accepted" if report.accepted else "refused"
    lines.append(f"{verdict} for {report.device}: {errors} errors, {warnings} warnings")
    return "\n".join(lines)


def summary(design: Path, reports: Sequence[Report]) -> dict[str, Any]:
    head = "tile kind buffers bytes memory descriptors max_descriptors locks max_locks s2mm mm2s"
    return {
        "design": str(design),
        "accepted": all(report.accepted for report in reports),
        "devices": [
            {
                "device": report.device,
                "findings": [asdict(finding) for finding in report.findings],
                "tiles": [dict(zip(head.split(), row, strict=True)) for row in _rows(report)],
            }
            for report in reports
        ],
    }


def _rows(report: Report) -> Iterator[tuple[str | int, ...]]:
    from uq.kernels.npu.dialect.attributes import Direction
    from uq.kernels.npu.target import COLUMNS, Target

    for place, used in report.usage.items():
        target = Target(report.device, COLUMNS[report.device])
        kind, limits = target.kind(place), target.limits(place)
        if kind is None or limits is None:
            continue
        yield (
            str(place),
            str(kind),
            used.buffers,
            used.nbytes,
            limits.memory,
            used.descriptors,
            limits.descriptors,
            used.locks,
            limits.locks,
            used.channels(Direction.S2MM),
            used.channels(Direction.MM2S),
        )
