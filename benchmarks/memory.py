"""Peak memory of real `uq quantize` processes on checkpoints of true widths.

    python -m benchmarks.memory --work FOLDER 27b:2:262144:rtn 27b:1:8192:gptq:65536

Each case is SHAPE:LAYERS:VOCABULARY:METHOD[:TOKENS]; calibration takes sequences of 1024 tokens.
`anonymous` is the largest sum of private and shared dirty memory that was seen (RssAnon + RssShmem,
every 20 ms), `resident` the kernel's own peak (VmHWM) which counts pages of files as well: the
sources are read, not mapped, so these are the program and its libraries. `estimate` is what
`uq quantize --dry-run` says beforehand. Checkpoint and bundle are deleted behind each case.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.random_checkpoint import write_random_checkpoint
from benchmarks.shapes import shape_config
from uq.text import table

INTERVAL = 0.02  # seconds
LENGTH = 1024  # tokens of a sequence


@dataclass(frozen=True)
class Case:
    shape: str
    layers: int
    vocabulary: int
    method: str
    tokens: int

    @classmethod
    def parse(cls, text: str) -> Case:
        shape, layers, vocabulary, method, *tokens = text.split(":")
        return cls(shape, int(layers), int(vocabulary), method, int(tokens[0]) if tokens else 0)

    def options(self, limit: str | None, shared: list[str]) -> list[str]:
        """Of `uq quantize`. One group for all linears: nothing is measured before."""
        found = ["--method", self.method, "--group", "32", *shared]
        if self.tokens:
            found += ["--calibration-tokens", str(self.tokens)]
            found += ["--calibration-length", str(LENGTH)]
        return [*found, "--max-memory", limit] if limit else found


@dataclass(frozen=True)
class Peak:
    """Bytes, and seconds of the run."""

    estimate: int
    spilled: int
    anonymous: int
    resident: int
    seconds: float


def measure(case: Case, work: Path, limit: str | None, shared: list[str]) -> Peak:
    """Make the case's checkpoint in `work`, quantize it, delete both."""
    source, out = work / "checkpoint", work / "bundle"
    config = shape_config(case.shape, case.layers, case.vocabulary)
    try:
        write_random_checkpoint(config, source)
        program = [sys.executable, "-m", "uq", "quantize", str(source), "-o", str(out)]
        command = [*program, *case.options(limit, shared)]
        dry = subprocess.run([*command, "--dry-run", "--json"], capture_output=True, check=True)
        found = json.loads(dry.stdout)
        began = time.perf_counter()
        anonymous, resident = watched(command)
        seconds = time.perf_counter() - began
    finally:
        for folder in (source, out, out.with_name(out.name + ".partial")):
            shutil.rmtree(folder, ignore_errors=True)
    return Peak(found["peak_memory"], found["spilled"], anonymous, resident, seconds)


def watched(command: list[str]) -> tuple[int, int]:
    """Peaks of anonymous and shared dirty memory, and of all resident memory, of one process."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    anonymous = resident = 0
    while process.poll() is None:
        status = Path(f"/proc/{process.pid}/status").read_text()
        if "RssAnon" in status:  # not once it is a zombie
            lines = dict(line.split(":") for line in status.splitlines())
            parts = {key: 1024 * int(lines[key].split()[0]) for key in ("RssAnon", "RssShmem")}
            anonymous = max(anonymous, sum(parts.values()))
            resident = 1024 * int(lines["VmHWM"].split()[0])
        time.sleep(INTERVAL)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}: exit status {process.returncode}")
    return anonymous, resident


def mib(nbytes: int) -> str:
    """All in one unit: runs are compared within a few percent."""
    return f"{nbytes / 2**20:.0f} MiB"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("cases", nargs="+", type=Case.parse, metavar="CASE")
    parser.add_argument("--work", type=Path, required=True, help="folder on a disk with room")
    parser.add_argument("--max-memory", metavar="10G", help="as of uq quantize")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu", help="as of uq quantize: cpu, vulkan")
    parser.add_argument("--no-curvature", action="store_true", help="as of uq quantize")
    args = parser.parse_args()
    shared = ["--threads", str(args.threads), "--device", args.device]
    shared += ["--no-curvature"] * args.no_curvature
    rows = []
    for case in args.cases:
        peak = measure(case, args.work, args.max_memory, shared)
        rows.append(
            (
                case.shape,
                case.layers,
                case.vocabulary,
                case.method,
                case.tokens,
                mib(peak.anonymous),
                mib(peak.resident),
                mib(peak.estimate),
                f"{peak.estimate / peak.resident:.2f}",
                mib(peak.spilled),
                f"{peak.seconds:.0f} s",
            )
        )
        print(" ".join(map(str, rows[-1])), file=sys.stderr)
    head = ("shape", "layers", "vocabulary", "method", "tokens", "anonymous", "resident")
    print(table(rows, head=(*head, "estimate", "of resident", "on disk", "time")))


if __name__ == "__main__":
    main()
