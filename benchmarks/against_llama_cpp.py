"""uq beside llama.cpp on one machine, in one run: decode, prefill, quantizing, start-up.

    python benchmarks/against_llama_cpp.py --llama-bin BUILD/bin [--threads 2] [--pairs 5]

Both sides run the same Gemma 3 270M weights: the demo checkpoint as an F16 GGUF, made once by
llama-quantize. uq's bundle is its default, the peer is Q4_0, as many bits per weight; its embedding
falls back to Q8_0 at this width. Data-free quantizing is timed on one grid, that of Q4_0. Runs
alternate, uq then llama.cpp, and every figure is the ratio of one pair, so a drifting machine moves
both sides. Above 1 means that uq is faster.

Build llama.cpp for the host (GGML_NATIVE). On Intel machines with AMX leave AMX out
(-mno-amx-tile -mno-amx-int8 -mno-amx-bf16): no Ryzen has it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

PROMPT, GENERATE = 512, 64
CHILD = """
import json, sys
from pathlib import Path
from uq.formats.bundle import open_bundle
from uq.kernels.cpu import open_cpu
from uq.validate.speed import measure_speed
session = open_cpu(open_bundle(sys.argv[1], verify="lazy"), threads=int(sys.argv[2]))
speed = measure_speed(session, prompt=int(sys.argv[3]), generate=int(sys.argv[4]), repeats=1)
print(json.dumps([speed.prefill_tps.median, speed.decode_tps.median]))
"""


@dataclass(frozen=True)
class Row:
    """One line of the table: paired figures of uq and its peer, or of uq against a limit."""

    name: str
    unit: str
    ours: list[float]
    peer: list[float]
    higher_is_better: bool

    @property
    def ratios(self) -> list[float]:
        pairs = zip(self.ours, self.peer, strict=True)
        return [a / b if self.higher_is_better else b / a for a, b in pairs]

    def __str__(self) -> str:
        ratio = statistics.median(self.ratios)
        low, high = min(self.ratios), max(self.ratios)
        ours, peer = statistics.median(self.ours), statistics.median(self.peer)
        return (
            f"| {self.name} | {ours:.4g} {self.unit} | {peer:.4g} {self.unit} "
            f"| {ratio:.2f}x ({low:.2f} to {high:.2f}) |"
        )


def run(*command: object) -> str:
    """The command's stdout; its stderr goes to the terminal when it fails."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{command[0]} failed ({done.returncode}):\n{done.stdout}\n{done.stderr}")
    return done.stdout


def wall(*command: object) -> float:
    """Seconds of a command that begins with the disk at rest: what others wrote is synced."""
    os.sync()
    start = time.perf_counter()
    run(*command)
    return time.perf_counter() - start


def alternate(
    pairs: int, ours: Callable[[], float], peer: Callable[[], float]
) -> list[list[float]]:
    """[our figures, the peer's figures]; one uncounted warm-up of each comes first."""
    ours(), peer()
    return [list(side) for side in zip(*((ours(), peer()) for _ in range(pairs)), strict=True)]


def uq_speed(bundle: Path, threads: int) -> tuple[float, float]:
    """(prefill, decode) tokens/s of one fresh process."""
    out = run(sys.executable, "-c", CHILD, bundle, threads, PROMPT, GENERATE)
    prefill, decode = json.loads(out.splitlines()[-1])
    return prefill, decode


def llama_speed(binary: Path, model: Path, threads: int) -> tuple[float, float]:
    """(prefill, decode behind the same prompt) tokens/s of one fresh process."""
    common = [
        binary / "llama-bench",
        "-m",
        model,
        "-t",
        threads,
        "-r",
        "1",
        "-o",
        "json",
    ]
    prefill = json.loads(run(*common, "-p", PROMPT, "-n", 0))[0]["avg_ts"]
    decode = json.loads(run(*common, "-p", 0, "-n", GENERATE, "-d", PROMPT))[0]["avg_ts"]
    return prefill, decode


def speed_rows(binary: Path, model: Path, bundle: Path, threads: int, pairs: int) -> list[Row]:
    samples = [
        (uq_speed(bundle, threads), llama_speed(binary, model, threads)) for _ in range(pairs)
    ]
    columns = {"prefill, 512 tokens": 0, "decode, 64 tokens behind 512": 1}
    return [
        Row(name, "t/s", [ours[i] for ours, _ in samples], [peer[i] for _, peer in samples], True)
        for name, i in columns.items()
    ]


def quantize_row(binary: Path, f16: Path, work: Path, threads: int, pairs: int) -> Row:
    ours_out, peer_out = work / "rtn-bundle", work / "peer.gguf"

    def ours() -> float:
        shutil.rmtree(ours_out, ignore_errors=True)
        flags = ["--method", "rtn", "--group", "32", "--threads", threads]
        return wall("uq", "quantize", f16, "-o", ours_out, *flags)

    def peer() -> float:
        peer_out.unlink(missing_ok=True)
        return wall(binary / "llama-quantize", f16, peer_out, "Q4_0", threads)

    name = "quantize F16 to 4 bits, rtn, whole command"
    seconds, peer_seconds = alternate(pairs, ours, peer)
    return Row(name, "s", seconds, peer_seconds, False)


def first_token_seconds(bundle: Path) -> float:
    """From the start of the process to the first byte of text."""
    start = time.perf_counter()
    command = ["uq", "generate", str(bundle), "-p", "The capital of France is", "--max-tokens", "4"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        os.read(process.stdout.fileno(), 1)
        elapsed = time.perf_counter() - start
        process.stdout.read()
    return elapsed


def limit_rows(bundle: Path, calibrated: float | None, runs: int) -> list[str]:
    """Figures that have a limit instead of a peer."""
    first_token_seconds(bundle)  # warm-up
    figures = {
        "`import uq`": ([wall(sys.executable, "-c", "import uq") for _ in range(runs)], 0.2),
        "`uq --help`": ([wall("uq", "--help") for _ in range(runs)], 0.2),
        "`uq generate`, first token": ([first_token_seconds(bundle) for _ in range(runs)], 2.0),
    }
    if calibrated is not None:
        figures["`uq quantize`, default method"] = ([calibrated], 240.0)
    return [
        f"| {name} | {statistics.median(values):.3g} s ({min(values):.3g} to {max(values):.3g}) "
        f"| {limit:g} s |"
        for name, (values, limit) in figures.items()
    ]


def prepare(binary: Path, work: Path) -> tuple[Path, Path]:
    """The demo checkpoint as F16 GGUF, and llama.cpp's Q4_0 of it."""
    from uq.formats.checkpoint.demo import demo_gguf

    f16, q4 = work / "f16.gguf", work / "q4_0.gguf"
    if not f16.exists():
        run(binary / "llama-quantize", "--allow-requantize", demo_gguf(), f16, "F16")
    if not q4.exists():
        run(binary / "llama-quantize", f16, q4, "Q4_0")
    return f16, q4


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--llama-bin", type=Path, required=True, help="folder of llama-bench")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "uq-benchmark")
    parser.add_argument("--skip-default-method", action="store_true", help="saves some minutes")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    f16, q4 = prepare(args.llama_bin, args.work)

    bundle = args.work / "int4"
    calibrated = None
    if not bundle.exists() or not args.skip_default_method:
        shutil.rmtree(bundle, ignore_errors=True)
        with tempfile.TemporaryDirectory() as cache:  # no costs of an earlier run
            calibrated = wall("env", f"UQ_CACHE={cache}", "uq", "quantize", f16, "-o", bundle)
    rows = speed_rows(args.llama_bin, q4, bundle, args.threads, args.pairs)
    rows.append(quantize_row(args.llama_bin, f16, args.work, args.threads, args.pairs))

    print(f"\n{args.threads} threads, median of {args.pairs} pairs (spread)\n")
    print("| what | uq | llama.cpp Q4_0 | uq is faster by |\n|---|---|---|---|")
    print("\n".join(map(str, rows)))
    print("\n| what | median (spread) | limit |\n|---|---|---|")
    print("\n".join(limit_rows(bundle, calibrated, args.pairs)))


if __name__ == "__main__":
    main()
