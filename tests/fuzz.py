"""Damage valid files at random and read them: `scripts/fuzz FORMAT|all [--runs N] [--seed S]`."""

from __future__ import annotations

import argparse
import faulthandler
import resource
import time
from pathlib import Path

from tests.fuzz_formats import FORMATS as MODEL_FORMATS
from tests.fuzzing import CONSTANT, PER_BYTE, SECONDS, fuzz
from tests.test_xdna_fuzz import FORMATS as NPU_FORMATS

FORMATS = MODEL_FORMATS | NPU_FORMATS
MEMORY = 512 << 20  # of address space for the whole process, beyond what it has at the start
STEP = 1000


def limit_memory() -> None:
    """What a library takes, which Python cannot trace, ends here at the latest."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


def run(name: str, runs: int, seed: int) -> str:
    """Fuzz one format; a line of what was found."""
    began = time.perf_counter()
    read = refused = 0
    peak = (0, 0)
    for start in range(0, runs, STEP):
        faulthandler.dump_traceback_later(900, exit=True)  # a loop in a library, seen from outside
        found = fuzz(FORMATS[name], min(STEP, runs - start), seed + start)
        read, refused, peak = read + found.read, refused + found.refused, max(peak, found.peak)
    faulthandler.cancel_dump_traceback_later()
    return (
        f"{name}: {runs} inputs, {read} read, {refused} refused, "
        f"{time.perf_counter() - began:.0f} s; most memory {peak[0]} bytes for {peak[1]}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/fuzz", description=__doc__)
    parser.add_argument("format", choices=[*FORMATS, "all"])
    parser.add_argument("--runs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    limit_memory()
    print(
        f"limits of an input: {SECONDS:g} s of processor time, {PER_BYTE} times its size and "
        f"{CONSTANT >> 20} MiB of memory; anything but a value or a UqError of one line fails",
        flush=True,
    )
    for name in FORMATS if args.format == "all" else [args.format]:
        print(run(name, args.runs, args.seed), flush=True)


if __name__ == "__main__":
    main()
