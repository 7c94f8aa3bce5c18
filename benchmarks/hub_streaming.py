"""Quantize a checkpoint of a real model's shape from a Hub on the loopback, and from a folder.

    python -m benchmarks.hub_streaming --shape 1b --runs 3     # both, alternating
    python -m benchmarks.hub_streaming --shape 12b --runs 0    # from the Hub alone, once

The weights are noise, made while they are served; the folder is written only if it is compared
with. The Hub runs in a process of its own, on the same machine, and takes part of its time. The
most bytes that a run had on the disk are looked up four times a second: the bundle in work and all
caches.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from tests.conftest import Tiny, config_of, tokenizer_config, tokenizer_of
from tests.hub_server.server import HubServer

REPO = "google/gemma-noise"
SHAPES: dict[str, dict[str, Any]] = {
    "1b": {"hidden": 1152, "layers": 26, "heads": 4, "kv_heads": 1, "head_dim": 256, "ffn": 6912},
    "4b": {"hidden": 2560, "layers": 34, "heads": 8, "kv_heads": 4, "head_dim": 256, "ffn": 10240},
    "12b": {
        "hidden": 3840, "layers": 48, "heads": 16, "kv_heads": 8, "head_dim": 256, "ffn": 15360,
    },
}  # fmt: skip
VOCABULARY = 262_144
TILE = 1 << 24


@dataclass(frozen=True)
class Noise:
    """A safetensors file in bf16 whose data repeat one block of noise; never held as a whole."""

    shapes: dict[str, tuple[int, ...]]

    @cached_property
    def header(self) -> bytes:
        entries: dict[str, Any] = {}
        end = 0
        for name, shape in self.shapes.items():
            start, end = end, end + 2 * math.prod(shape)
            entries[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
        text = json.dumps(entries).encode()
        return len(text).to_bytes(8, "little") + text

    @cached_property
    def tile(self) -> bytes:
        values = np.random.default_rng(0).standard_normal(TILE // 2, np.float32) * 0.02
        return (values.view(np.uint32) >> 16).astype(np.uint16).tobytes()

    @property
    def size(self) -> int:
        return len(self.header) + 2 * sum(map(math.prod, self.shapes.values()))

    @property
    def sha256(self) -> str:
        return "0" * 64  # a name for the store: nothing in this benchmark checks it

    def read(self, start: int, stop: int) -> bytes:
        head = self.header[start:stop]
        first = max(start - len(self.header), 0) % TILE
        wanted = stop - start - len(head)
        copies = -(-(first + wanted) // TILE)
        return head + (self.tile * copies)[first : first + wanted]


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


def serve(tiny: Tiny) -> None:
    """Be the Hub until stdin ends; the address is the first line of stdout."""
    with HubServer() as hub:
        hub.store.add(REPO, {**small_files(tiny), "model.safetensors": Noise(dict(tensors(tiny)))})
        print(hub.url, flush=True)
        sys.stdin.read()


def write_folder(tiny: Tiny, folder: Path) -> None:
    folder.mkdir()
    for name, data in small_files(tiny).items():
        (folder / name).write_bytes(data)
    noise = Noise(dict(tensors(tiny)))
    with (folder / "model.safetensors").open("wb") as file:
        for start in range(0, noise.size, TILE):
            file.write(noise.read(start, min(start + TILE, noise.size)))


def quantize(source: str, work: Path, url: str, method: str) -> dict[str, float]:
    """Seconds of one run; the bytes of the bundle, and the most that was on the disk beside it."""
    environment = os.environ | {
        "HF_ENDPOINT": url, "HF_HOME": str(work / "hf"), "UQ_CACHE": str(work / "cache"),
        "HF_HUB_DISABLE_XET": "1",
    }  # fmt: skip
    out = work / "bundle"
    command = [sys.executable, "-m", "uq", "quantize", source, "-o", str(out), "--method", method]
    began, most = time.perf_counter(), 0
    with (work / "log").open("w") as log:
        run = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        while run.poll() is None:
            most = max(most, used(work))
            time.sleep(0.25)
    if run.returncode:
        sys.exit((work / "log").read_text())
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "bundle": used(out), "most": max(most, used(work))}


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
    parser.add_argument("--runs", type=int, default=3, help="pairs; 0: the Hub alone, once")
    parser.add_argument("--method", default="rtn", choices=("rtn", "gptq"))
    parser.add_argument("--work", type=Path, help="folder for everything; default: temporary")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    tiny = Tiny(vocab=VOCABULARY, window=1024, pattern=6, **SHAPES[args.shape])
    if args.serve:
        return serve(tiny)
    with tempfile.TemporaryDirectory(dir=args.work) as work:
        compare(tiny, Path(work), args)


def compare(tiny: Tiny, work: Path, args: argparse.Namespace) -> None:
    if args.runs:
        write_folder(tiny, work / "model")
    command = [sys.executable, "-m", "benchmarks.hub_streaming", "--serve", "--shape", args.shape]
    hub = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert hub.stdout is not None and hub.stdin is not None
    url = hub.stdout.readline().strip()
    took: dict[str, list[float]] = {}
    for number in range(max(args.runs, 1)):
        for kind, source in {"hub": REPO, "folder": str(work / "model")}.items():
            if kind == "hub" or args.runs:
                run = work / f"{kind}-{number}"
                run.mkdir()
                figures = quantize(source, run, url, args.method)
                took.setdefault(kind, []).append(figures["seconds"])
                print(kind, json.dumps(figures), flush=True)
                subprocess.run(["rm", "-r", str(run)], check=True)
    hub.stdin.close()
    hub.wait()
    if args.runs:
        ratios = [ours / local for ours, local in zip(took["hub"], took["folder"], strict=True)]
        print(f"hub / folder: median {median(ratios):.2f}, {min(ratios):.2f} to {max(ratios):.2f}")


if __name__ == "__main__":
    main()
