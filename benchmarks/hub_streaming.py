"""Quantize a checkpoint of a real model's shape from a Hub on the loopback, and from its folder.

    python -m benchmarks.hub_streaming --shape 1b --runs 3
    python -m benchmarks.hub_streaming --shape 12b --layers 2 --method auto --tokens 2048

The weights are noise. The Hub runs in a process of its own, on the same machine, and takes part of
its time; it sends the folder's file by sendfile. Runs alternate, so that both find the file in the
page cache if it fits there. The most bytes that a run had on the disk are looked up four times a
second, as what the disk has less free: files without a name count, and whatever else writes.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import psutil

from tests.hub_server.server import HubServer
from tests.hub_server.store import OnDisk
from tests.tiny import Tiny, config_of, tokenizer_config, tokenizer_of

REPO = "google/gemma-noise"
SHAPES: dict[str, dict[str, Any]] = {
    "1b": {"hidden": 1152, "layers": 26, "heads": 4, "kv_heads": 1, "head_dim": 256, "ffn": 6912},
    "4b": {"hidden": 2560, "layers": 34, "heads": 8, "kv_heads": 4, "head_dim": 256, "ffn": 10240},
    "12b": {
        "hidden": 3840, "layers": 48, "heads": 16, "kv_heads": 8, "head_dim": 256, "ffn": 15360,
    },
}  # fmt: skip
VOCABULARY = 262_208
TILE = 1 << 24  # bytes
WEIGHTS = "model.safetensors"


def header(shapes: dict[str, tuple[int, ...]]) -> bytes:
    """Of a safetensors file in bf16."""
    entries: dict[str, Any] = {}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * math.prod(shape)
        entries[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text


def noise() -> bytes:
    """Normal values of a weight's size, as bf16."""
    values = np.random.default_rng(0).standard_normal(TILE // 2, np.float32) * 0.02
    return (values.view(np.uint32) >> 16).astype(np.uint16).tobytes()


def tensors(tiny: Tiny) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes as a checkpoint of gemma3 has them."""
    q, kv = tiny.heads * tiny.head_dim, tiny.kv_heads * tiny.head_dim
    linears = {
        "self_attn.q_proj": (q, tiny.hidden),
        "self_attn.k_proj": (kv, tiny.hidden),
        "self_attn.v_proj": (kv, tiny.hidden),
        "self_attn.o_proj": (tiny.hidden, q),
        "mlp.gate_proj": (tiny.ffn, tiny.hidden),
        "mlp.up_proj": (tiny.ffn, tiny.hidden),
        "mlp.down_proj": (tiny.hidden, tiny.ffn),
    }
    norms = ("input", "post_attention", "pre_feedforward", "post_feedforward")
    yield "model.embed_tokens.weight", (tiny.vocab, tiny.hidden)
    for layer in range(tiny.layers):
        prefix = f"model.layers.{layer}."
        yield from ((f"{prefix}{role}.weight", shape) for role, shape in linears.items())
        yield from ((f"{prefix}{name}_layernorm.weight", (tiny.hidden,)) for name in norms)
        yield from ((f"{prefix}self_attn.{x}_norm.weight", (tiny.head_dim,)) for x in "qk")
    yield "model.norm.weight", (tiny.hidden,)


def small_files(tiny: Tiny) -> dict[str, bytes]:
    return {
        "config.json": json.dumps(config_of(tiny)).encode(),
        "tokenizer_config.json": json.dumps(tokenizer_config()).encode(),
        "tokenizer.json": tokenizer_of(tiny.vocab).to_str().encode(),
    }


def serve(folder: Path) -> None:
    """Be the Hub until stdin ends; the address is the first line of stdout.

    Every line of stdin is answered by how many bytes of weights were sent since the last one.
    """
    with HubServer() as hub:
        hub.store.add(REPO, {path.name: content(path) for path in folder.iterdir()})
        print(hub.url, flush=True)
        known = 0
        for _ in sys.stdin:
            sent = sum(request.sent for request in hub.requests("GET", r"\.safetensors$|/cdn/"))
            print(sent - known, flush=True)
            known = sent


def content(path: Path) -> bytes | OnDisk:
    return OnDisk(path) if path.name == WEIGHTS else path.read_bytes()


def write_folder(tiny: Tiny, folder: Path) -> None:
    """A checkpoint whose data repeat one block of noise."""
    folder.mkdir()
    for name, data in small_files(tiny).items():
        (folder / name).write_bytes(data)
    shapes, tile = dict(tensors(tiny)), noise()
    left = 2 * sum(map(math.prod, shapes.values()))
    with (folder / WEIGHTS).open("wb") as file:
        file.write(header(shapes))
        while left:
            left -= file.write(tile[:left])


def quantize(source: str, work: Path, url: str, options: list[str]) -> dict[str, float]:
    """Seconds of one run, by the clock and of the processor; bytes of the bundle, most on disk."""
    environment = os.environ | {
        "HF_ENDPOINT": url, "HF_HOME": str(work / "hf"), "UQ_CACHE": str(work / "cache"),
        "HF_HUB_DISABLE_XET": "1",
    }  # fmt: skip
    out, others = work / "bundle", occupied(work)
    command = [sys.executable, "-m", "uq", "quantize", source, "-o", str(out), *options]
    began, most, before = time.perf_counter(), 0, processor()
    with (work / "log").open("w") as log:
        run = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        while run.poll() is None:
            most = max(most, occupied(work) - others)
            time.sleep(0.25)
    if run.returncode:
        sys.exit((work / "log").read_text())
    seconds = time.perf_counter() - began
    return {
        "seconds": seconds,
        "processor": processor() - before,
        "bundle": used(out),
        "most": max(most, occupied(work) - others),
    }


def processor() -> float:
    """Seconds of all processes that have ended and were waited for."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def spent(pid: int) -> float:
    """Processor seconds of a process that runs."""
    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)


def occupied(folder: Path) -> int:
    """Bytes on the disk of a folder."""
    return int(psutil.disk_usage(str(folder)).used)


def used(folder: Path) -> int:
    """Bytes on the disk; files come and go while it is counted."""
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(root, name)).st_blocks * 512
            except FileNotFoundError:
                continue
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--layers", type=int, help="default: as many as the model has")
    parser.add_argument("--runs", type=int, default=3, help="pairs of runs")
    parser.add_argument("--method", default="rtn", choices=("auto", "rtn", "gptq"))
    parser.add_argument("--tokens", type=int, default=2048, help="of calibration")
    parser.add_argument("--work", type=Path, help="folder for everything; default: temporary")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        return serve(args.serve)
    tiny = Tiny(vocab=VOCABULARY, window=1024, pattern=6, **SHAPES[args.shape])
    tiny = replace(tiny, layers=args.layers or tiny.layers)
    options = ["--method", args.method, "--calibration-tokens", str(args.tokens)]
    with tempfile.TemporaryDirectory(dir=args.work) as work:
        compare(tiny, Path(work), args.runs, options)


def compare(tiny: Tiny, work: Path, runs: int, options: list[str]) -> None:
    folder = work / "model"
    write_folder(tiny, folder)
    took: dict[str, list[float]] = {"hub": [], "folder": []}
    with loopback_hub(folder) as (hub, url):
        for number in range(runs):
            for kind, source in {"hub": REPO, "folder": str(folder)}.items():
                run = work / f"{kind}-{number}"
                run.mkdir()
                os.sync()  # what an earlier run left to write would slow this one down
                before = spent(hub.pid)
                figures = quantize(source, run, url, options)
                figures["hub_processor"] = spent(hub.pid) - before
                figures["fetched"] = fetched(hub) / (folder / WEIGHTS).stat().st_size
                took[kind].append(figures["seconds"])
                print(kind, json.dumps(figures), flush=True)
                shutil.rmtree(run)
    ratios = [ours / local for ours, local in zip(took["hub"], took["folder"], strict=True)]
    print(f"hub / folder: median {median(ratios):.2f}, {min(ratios):.2f} to {max(ratios):.2f}")


def fetched(hub: subprocess.Popen[str]) -> int:
    """Bytes of weights that it has sent since it was asked last."""
    assert hub.stdout is not None and hub.stdin is not None
    print(file=hub.stdin, flush=True)
    return int(hub.stdout.readline())


@contextmanager
def loopback_hub(folder: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Its process and its address."""
    command = [sys.executable, "-m", "benchmarks.hub_streaming", "--serve", str(folder)]
    hub = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert hub.stdout is not None and hub.stdin is not None
    yield hub, hub.stdout.readline().strip()
    hub.stdin.close()
    hub.wait()


if __name__ == "__main__":
    main()
