"""Ways to break a small bundle."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from uq.errors import BundleError
from uq.formats.bundle import open_bundle
from uq.formats.manifest import checksum_line

SMALL: dict[str, Any] = {"hidden": 96, "heads": 3, "kv_heads": 1, "ffn": 160, "vocab": 401}


SHARD = "model-00002-of-00003.safetensors"


UP = "model.layers.0.mlp.up_proj.weight"


GAIN = "model.layers.0.input_layernorm.gain"


Tree = dict[str, Any]


def edit_manifest(bundle: Path, change: Callable[[Tree], object]) -> None:
    """Change the manifest as an author of bundles could: with a matching checksum."""
    tree = json.loads((bundle / "manifest.json").read_bytes())
    change(tree)
    write_manifest(bundle, json.dumps(tree).encode())


def write_manifest(bundle: Path, data: bytes) -> None:
    (bundle / "manifest.json").write_bytes(data)
    (bundle / "manifest.sha256").write_bytes(checksum_line(hashlib.sha256(data).hexdigest()))


def edit_shard(bundle: Path, change: Callable[[Tree, bytearray], object]) -> None:
    """Change header and data of a shard and list its new size and hash."""
    raw = (bundle / SHARD).read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header, data = json.loads(raw[8 : 8 + length]), bytearray(raw[8 + length :])
    change(header, data)
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % 64)
    write_shard(bundle, len(text).to_bytes(8, "little") + text + bytes(data))


def write_shard(bundle: Path, content: bytes) -> None:
    (bundle / SHARD).write_bytes(content)
    record = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    edit_manifest(bundle, lambda tree: tree["files"].update({SHARD: record}))


def refuse(bundle: Path, message: str) -> None:
    """Both ways of opening refuse, in one line."""
    for verify in ("full", "lazy"):
        with pytest.raises(BundleError, match=message) as caught:
            open_bundle(bundle, verify=verify)
        assert "\n" not in str(caught.value)
