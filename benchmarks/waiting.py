"""What a person waits for at the terminal.

    python -m benchmarks.waiting chat BUNDLE    first token of `uq chat` in a new process
    python -m benchmarks.waiting publish        `uq publish --dry-run` of a 27B in INT4

The chat runs in a pseudo-terminal and is typed to when its prompt appears; before each run the
bundle's files are dropped from the page cache. A base model gets Gemma's turns for a template.

The large bundle has the true headers, sizes and hashes of Gemma 3 27B's shape; its data are holes
of zeros, so that it needs no disk. The Hub is that of the tests, on the loopback, and the report
one of the tests.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import pty
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import median

import numpy as np

from tests.hub_server.server import HubServer
from tests.hub_server.store import Account
from tests.test_report import REPORT
from tests.tiny import Tiny, config_of, tokenizer_of
from uq.formats.bundle import Bundle, open_bundle
from uq.formats.checkpoint.hf_config import parse_config
from uq.formats.config import GemmaConfig
from uq.formats.entries import ArrayEntry, Entry, QuantEntry
from uq.formats.manifest import (
    CHECKSUM,
    MANIFEST,
    FileRecord,
    Manifest,
    Provenance,
    checksum_line,
    expected_tensors,
)
from uq.formats.shard import make_header, shard_file
from uq.formats.spec import Spec
from uq.validate.files import save_report

SHAPE = Tiny(
    vocab=262_208, hidden=5376, layers=62, heads=32, kv_heads=16, head_dim=128, ffn=21_504,
    window=1024, pattern=6,
)  # fmt: skip
BASE, TARGET, TOKEN = "google/gemma-3-27b-it", "maker/gemma-3-27b-it-int4", "hf_write"
ZEROS = bytes(1 << 24)
TURNS = """{{ bos_token }}{% for m in messages %}<start_of_turn>{{
'model' if m.role == 'assistant' else m.role }}\n{{ m.content }}<end_of_turn>\n{% endfor
%}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("what", choices=("chat", "publish"))
    parser.add_argument("bundle", type=Path, nargs="?")
    parser.add_argument("--runs", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        if args.what == "chat":
            runs = [first_token(open_bundle(args.bundle), Path(work)) for _ in range(args.runs)]
            print_seconds("uq chat, until its prompt", [run[0] for run in runs])
            print_seconds("uq chat, until the first token", [run[1] for run in runs])
        else:
            publish(Path(work), args.runs)


def print_seconds(what: str, seconds: list[float]) -> None:
    low, middle, high = min(seconds), median(seconds), max(seconds)
    print(f"{what}: {middle:.2f} s ({low:.2f} to {high:.2f}), {len(seconds)} runs")


def first_token(bundle: Bundle, work: Path) -> tuple[float, float]:
    """Seconds from typing the command to the prompt, and to the first character of an answer."""
    template = work / "turns.jinja"
    template.write_text(TURNS)
    forget([bundle.path / name for name in bundle.manifest.files])
    command = [sys.executable, "-m", "uq", "chat", str(bundle.path), "--max-tokens", "8"]
    terminal, theirs = pty.openpty()
    began = time.perf_counter()
    chat = subprocess.Popen(
        [*command, "--template", str(template)], stdin=theirs, stdout=theirs,
        stderr=subprocess.DEVNULL, env=os.environ | {"TERM": "dumb"},
    )  # fmt: skip
    os.close(theirs)
    wait_for(terminal, b"> ")
    prompted = time.perf_counter() - began
    os.write(terminal, b"Why is the sky blue?\n")
    wait_for(terminal, b"blue?\r\n")
    os.read(terminal, 1)
    answered = time.perf_counter() - began
    chat.kill()
    chat.wait()
    os.close(terminal)
    return prompted, answered


def wait_for(terminal: int, text: bytes) -> None:
    seen = b""
    while not seen.endswith(text):
        seen += os.read(terminal, 1)


def forget(files: list[Path]) -> None:
    """Drop files from the page cache."""
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def publish(work: Path, runs: int) -> None:
    folder = write_holes(work / "gemma-3-27b-it-int4")
    bundle = open_bundle(folder, verify="lazy")
    save_report(replace(REPORT, bundle=replace(REPORT.bundle, sha256=bundle.sha256)), folder)
    print(f"a bundle of {bundle.nbytes / 1e9:.1f} GB")
    with loopback_hub(work) as environment:
        seconds = [dry_run(folder, environment) for _ in range(runs)]
    print_seconds("uq publish --dry-run", seconds)


def dry_run(folder: Path, environment: dict[str, str]) -> float:
    command = [sys.executable, "-m", "uq", "publish", str(folder), TARGET, "--dry-run"]
    began = time.perf_counter()
    subprocess.run(
        [*command, "--base-model", BASE], env=environment, check=True, stdout=subprocess.DEVNULL
    )
    return time.perf_counter() - began


@contextmanager
def loopback_hub(work: Path) -> Iterator[dict[str, str]]:
    """The environment in which uq finds it."""
    with HubServer() as hub:
        hub.store.add(BASE, {"config.json": b"{}"}, gated=True)
        hub.store.accounts[TOKEN] = Account("maker", accepted=frozenset({BASE}))
        yield os.environ | {
            "HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HOME": str(work / "hf"),
            "HF_HUB_DISABLE_XET": "1",
        }  # fmt: skip


def write_holes(folder: Path) -> Path:
    """A bundle of `SHAPE` with weights of zero, in INT4 with an INT8 embedding."""
    folder.mkdir()
    config = parse_config(config_of(SHAPE))
    shards: dict[str, list[Entry]] = {}
    for name, entry in entries(config).items():
        number = int(name.split(".")[2]) + 1 if name.startswith("model.layers.") else 0
        shards.setdefault(shard_file(number, config.num_layers + 1), []).append(entry)
    files = {file: write_shard(folder / file, found) for file, found in shards.items()}
    tokenizer = tokenizer_of(SHAPE.vocab).to_str().encode()
    (folder / "tokenizer.json").write_bytes(tokenizer)
    files["tokenizer.json"] = FileRecord(len(tokenizer), hashlib.sha256(tokenizer).hexdigest())
    placed = [(file, entry) for file, found in shards.items() for entry in found]
    manifest = Manifest(
        model=config, recipe="int4", options={}, calibration=None, left_out=(), tools={},
        provenance=Provenance("hub", BASE, "main", "bf16", {}),
        tensors={e.name: e.record(file) for file, e in placed if isinstance(e, QuantEntry)},
        arrays={e.name: e.record(file) for file, e in placed if isinstance(e, ArrayEntry)},
        files=files,
    )  # fmt: skip
    data = manifest.to_bytes()
    (folder / MANIFEST).write_bytes(data)
    (folder / CHECKSUM).write_bytes(checksum_line(hashlib.sha256(data).hexdigest()))
    return folder


def entries(config: GemmaConfig) -> dict[str, Entry]:
    weights, gains = expected_tensors(config)
    found: dict[str, Entry] = {}
    for name, shape in weights.items():
        spec = Spec(8, 64) if "embed" in name else Spec(4, 32)
        found[name] = QuantEntry(name, shape, spec, "igpu", "rtn", ())
    for name, width in gains.items():
        found[name] = ArrayEntry(name, np.zeros(width, np.float32))
    return found


def write_shard(path: Path, found: list[Entry]) -> FileRecord:
    """The header and a hole; its true hash."""
    found.sort(key=lambda entry: -entry.alignment)
    header = make_header({e.name: (e.dtype, e.stored_shape) for e in found})
    left = sum(entry.nbytes for entry in found)
    digest, size = hashlib.sha256(header), len(header) + left
    while left:
        piece = memoryview(ZEROS)[:left]
        digest.update(piece)
        left -= len(piece)
    path.write_bytes(header)
    os.truncate(path, size)
    return FileRecord(size, digest.hexdigest())


if __name__ == "__main__":
    main()
