"""`uq bench`: how fast a bundle runs, beside what the memory of the device allows."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from uq.commands.arguments import bundle, whole
from uq.commands.sampling import add_device, read_numerics
from uq.errors import UsageError


def configure(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("bundle", type=bundle, metavar="BUNDLE", help="folder written by uq quantize, or Hub id")
    add("--prompt", type=whole(1), default=512, metavar="N", help="default: %(default)s tokens")
    add("--generate", type=whole(1), default=64, metavar="N", help="default: %(default)s tokens")
    add("--repeats", type=whole(1), default=5, metavar="N", help="default: %(default)s")
    add(
        "--batch", type=whole(1), default=1, metavar="N",
        help="also run N sequences together, up to 64 on a GPU",
    )  # fmt: skip
    add("--by-kernel", action="store_true", help="time the kernels of a decode step")
    add("--trace", type=Path, metavar="FILE", help="write that step for Perfetto (JSON)")
    add("--json", action="store_true", help="print one JSON object")
    add_device(parser)


def run(args: argparse.Namespace) -> int:
    from uq.formats.bundle import open_bundle
    from uq.kernels.backends import first_run_note
    from uq.kernels.profile import chrome_trace
    from uq.progress import terminal_progress
    from uq.validate.bench import BenchOptions, bench

    if args.trace and not args.trace.resolve().parent.is_dir():
        raise UsageError(f"--trace {args.trace}: there is no such folder; make it")
    options = BenchOptions(
        device=args.device,
        threads=args.threads,
        prompt=args.prompt,
        generate=args.generate,
        repeats=args.repeats,
        kernels=args.by_kernel or args.trace is not None,
        batch=args.batch,
        numerics=read_numerics(args),
    )
    if note := first_run_note(args.device):
        print(note, file=sys.stderr)
    found = bench(open_bundle(args.bundle, verify="lazy"), options, terminal_progress())
    if args.trace and found.step is not None:
        args.trace.write_text(chrome_trace(found.step), encoding="utf-8")
    print(json.dumps(found.to_json(), indent=1, ensure_ascii=False) if args.json else found)
    return 0
