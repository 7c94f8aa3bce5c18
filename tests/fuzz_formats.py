"""The readers of everything a model or a bundle from a stranger consists of, as fuzz targets.

The seeds are in `golden/fuzz`; readers that want a folder get a copy of one in which the damaged
file takes the place of the whole one.
"""

from __future__ import annotations

import atexit
import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

from tests.fuzzing import Edit, Format, damage_json
from uq import __version__
from uq.chat import ChatTemplate
from uq.formats.bundle import open_bundle
from uq.formats.chat import read_conversations
from uq.formats.checkpoint import Checkpoint, open_checkpoint
from uq.formats.checkpoint.compact import without_unused_merges
from uq.formats.checkpoint.safetensors_file import file_tensors, index_shards
from uq.formats.checkpoint.tensors import is_readable, read_rows
from uq.formats.checkpoint.weight_file import LocalFile
from uq.formats.journal import JOURNAL, Journal
from uq.formats.manifest import CHECKSUM, MANIFEST, SCHEMA, checksum_line, parse_manifest
from uq.formats.shard import Shard
from uq.formats.tokenizer import Tokenizer
from uq.kernels.npu.toolchain.carried import FOLDER, INDEX, states
from uq.quantize.text import read_text

SEEDS = Path(__file__).parent / "golden" / "fuzz"
MODEL, BUNDLE = SEEDS / "model", SEEDS / "bundle"
NPU_INDEX = {
    "schema": 1,
    "designs": {
        "attention": {
            "device": "npu1",
            "state": "not compiled",
            "objects": {"kernel.o": {"source": "kernel.cc", "defines": {"N": "4"}}},
            "files": {"design.mlir": "0" * 64, "kernel.cc": "1" * 64},
        }
    },
}


@cache
def folder(name: str) -> Path:
    """A folder of this process for files that must lie on a disk, removed at its end."""
    path = Path(tempfile.mkdtemp(prefix=f"uq-fuzz-{name}-"))
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path


@cache
def copy_of(seed: Path, name: str) -> Path:
    return Path(shutil.copytree(seed, folder(name) / seed.name))


def written(data: bytes, name: str) -> Path:
    path = folder("files") / name
    path.write_bytes(data)
    return path


def seal_safetensors(data: bytes, edits: Sequence[Edit]) -> bytes:
    """Damage in the header's values, which gets the length that it has then."""
    length = int.from_bytes(data[:8], "little")
    header = damage_json(data[8 : 8 + length], edits)
    header += b" " * (-(8 + len(header)) % 64)
    return len(header).to_bytes(8, "little") + header + data[8 + length :]


def seal_journal(data: bytes, edits: Sequence[Edit]) -> bytes:
    return sealed(damage_json(data.partition(b"\n")[0], edits))


def mend_journal(data: bytes) -> bytes:
    return sealed(data.rpartition(b"\n")[0].rpartition(b"\n")[0])


def sealed(line: bytes) -> bytes:
    return line + b"\n" + hashlib.sha256(line).hexdigest().encode() + b"\n"


def lines(data: bytes, edits: Sequence[Edit]) -> bytes:
    """Damage in the first of several JSON lines."""
    first, _, rest = data.partition(b"\n")
    return damage_json(first, edits) + b"\n" + rest


def read_shard(data: bytes) -> None:
    shard = Shard(written(data, "model-00002-of-00002.safetensors"))
    for name, stored in shard.tensors.items():
        shard.raw(name) if stored.dtype == "U8" else shard.array(name)


def read_manifest_of_bundle(data: bytes) -> None:
    """Whoever can change a manifest can write its checksum."""
    root = copy_of(BUNDLE, "bundle")
    (root / MANIFEST).write_bytes(data)
    (root / CHECKSUM).write_bytes(checksum_line(hashlib.sha256(data).hexdigest()))
    bundle = open_bundle(root)
    bundle.layer(0)
    bundle.tokenizer().encode("the time")


def read_safetensors(data: bytes) -> None:
    for tensor in file_tensors(LocalFile(written(data, "model.safetensors"))).values():
        if is_readable(tensor.dtype) and tensor.shape and tensor.shape[0]:
            read_rows(tensor, 0, tensor.shape[0])


def checkpoint_reader(name: str) -> Callable[[bytes], None]:
    def read(data: bytes) -> None:
        root = copy_of(MODEL, name)
        (root / name).write_bytes(data)
        read_all(open_checkpoint(root))

    return read


def read_gguf(data: bytes) -> None:
    checkpoint = open_checkpoint(written(data, "model.gguf"))
    read_all(checkpoint)
    checkpoint.tokenizer().encode("the time")


def read_all(checkpoint: Checkpoint) -> None:
    for layer in range(checkpoint.config.num_layers):
        checkpoint.layer(layer)
    checkpoint.embedding(0, checkpoint.config.vocab_size)
    checkpoint.head(0, 1)
    checkpoint.final_norm()


def read_config(data: bytes) -> None:
    checkpoint_reader("config.json")(data)


def read_tokenizer(data: bytes) -> None:
    tokenizer = Tokenizer.from_bytes(without_unused_merges(data), 2, (1,))
    ids = tokenizer.encode("the time <bos> of 世界\n\n  </s>" * 3)
    tokenizer.decode([*ids, 0, 10**6])


def read_tokenizer_config(data: bytes) -> None:
    ChatTemplate.from_assets({"tokenizer_config.json": data})


def read_journal(data: bytes) -> None:
    written(data, JOURNAL)
    journal = Journal.load(folder("files"))
    journal.require_same(Journal.begin({}, 2), folder("files"))


def read_index(data: bytes) -> None:
    index_shards(written(data, "index.json"))


def read_chats(data: bytes) -> None:
    read_conversations("chats", data.decode("utf-8", "replace"))
    read_text(str(written(data, "chats.jsonl")))


def read_npu_index(data: bytes) -> None:
    root = folder("npu")
    (root / FOLDER).mkdir(exist_ok=True)
    (root / FOLDER / INDEX).write_bytes(data)
    states(root)


def seeds(*names: str) -> list[bytes]:
    return [(SEEDS / name).read_bytes() for name in names]


def journal_seed() -> bytes:
    line = seeds("journal.json")[0].partition(b"\n")[0]
    document = json.loads(line)
    document["identity"] = {"uq": __version__, "schema": SCHEMA, "shards": 2}
    return sealed(json.dumps(document).encode())


CONFIGS = ("model/config.json", "config-gemma.json", "config-gemma2.json", "config-multimodal.json")
SHARDS = tuple(f"bundle/model-0000{n}-of-00002.safetensors" for n in (2, 1))
FORMATS = {
    "manifest": Format(seeds("bundle/manifest.json"), parse_manifest, structured=damage_json),
    "bundle": Format(
        seeds("bundle/manifest.json"), read_manifest_of_bundle, structured=damage_json
    ),
    "shard": Format(seeds(*SHARDS), read_shard, structured=seal_safetensors),
    "journal": Format([journal_seed()], read_journal, mend_journal, seal_journal),
    "safetensors": Format(
        seeds("model/model.safetensors"), read_safetensors, structured=seal_safetensors
    ),
    "checkpoint": Format(
        seeds("model/model.safetensors"),
        checkpoint_reader("model.safetensors"),
        structured=seal_safetensors,
    ),
    "index": Format(seeds("index.json"), read_index, structured=damage_json),
    "config": Format(seeds(*CONFIGS), read_config, structured=damage_json),
    "generation": Format(
        seeds("model/generation_config.json"),
        checkpoint_reader("generation_config.json"),
        structured=damage_json,
    ),
    "gguf": Format(seeds("model.gguf"), read_gguf),
    "tokenizer": Format(seeds("model/tokenizer.json"), read_tokenizer, structured=damage_json),
    "tokenizer-config": Format(
        seeds("model/tokenizer_config.json"), read_tokenizer_config, structured=damage_json
    ),
    "chats": Format(seeds("chat.jsonl"), read_chats, structured=lines),
    "npu-index": Format([json.dumps(NPU_INDEX).encode()], read_npu_index, structured=damage_json),
}
