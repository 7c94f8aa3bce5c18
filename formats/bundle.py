"""Opening a bundle: everything is checked before anything is used.

The checks and their messages are listed in `formats/README.md`, section 7.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from stat import S_ISREG
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from uq.errors import BundleError
from uq.formats.config import GemmaConfig, layer_tensor
from uq.formats.decode import MAX_JSON
from uq.formats.disk import hash_files
from uq.formats.hub_name import cached_repository, is_hub_id, split_revision
from uq.formats.manifest import (
    CHECKSUM,
    MANIFEST,
    TOWERS,
    FileRecord,
    Manifest,
    TensorRecord,
    checksum_line,
    gain_name,
    is_shard,
    parse_manifest,
)
from uq.formats.shard import Shard
from uq.formats.spec import QuantTensor
from uq.formats.tokenizer import Tokenizer
from uq.formats.towers import TowerTensor, open_towers

PIECE = 1 << 22  # weights that are unpacked at a time where a tensor is read in pieces


def open_bundle(path: str | Path, *, verify: Literal["full", "lazy"] = "full") -> Bundle:
    """Open a bundle.

    Args:
        path: folder, or `owner/name` on the Hub, which is downloaded into the Hugging Face cache.
        verify: `full` hashes every file now; `lazy` hashes a file when it is first used.

    Raises:
        BundleError: anything that the specification forbids; names the file and the field.
        HubError: the Hub refused or could not be reached.
    """
    root = Path(path)
    if not root.exists() and is_hub_id(split_revision(str(path))[0]):
        from uq.formats.hub_bundle import download_bundle  # only who asks for it pays for it

        root = download_bundle(str(path))
    with _readable(root):
        manifest, sha256 = _read_manifest(root)
        for name, record in manifest.files.items():
            _check_file(root, name, record)
        shards = {name: Shard(root / name) for name in manifest.files if is_shard(name)}
    for name, shard in shards.items():
        shard.check(
            {key: record for key, record in manifest.tensors.items() if record.file == name},
            {key: record for key, record in manifest.arrays.items() if record.file == name},
        )
    bundle = Bundle(root, manifest, sha256, shards)
    if verify == "full":
        bundle.verify()
    return bundle


class Bundle:
    """An opened bundle. Weights stay on the disk, mapped, until they are asked for.

    Attributes:
        sha256: of the manifest; the identity of the bundle.
    """

    def __init__(
        self, path: Path, manifest: Manifest, sha256: str, shards: Mapping[str, Shard]
    ) -> None:
        self.path = path
        self.manifest = manifest
        self.sha256 = sha256
        self._shards = shards
        self._verified: set[str] = set()

    @classmethod
    def open(cls, path: str | Path, *, verify: Literal["full", "lazy"] = "full") -> Bundle:
        """`open_bundle`."""
        return open_bundle(path, verify=verify)

    @property
    def config(self) -> GemmaConfig:
        return self.manifest.model

    @property
    def name(self) -> str:
        repository = cached_repository(self.path)
        if repository is not None:
            return repository.name.rpartition("--")[2]
        return self.path.resolve().name

    @property
    def nbytes(self) -> int:
        """Size of all files but the reports."""
        listed = sum(record.size for record in self.manifest.files.values())
        return listed + sum((self.path / name).stat().st_size for name in (MANIFEST, CHECKSUM))

    @property
    def bits_per_weight(self) -> float:
        """Bits of all tensors, scales, gains and padding included, per parameter of the model."""
        stored = sum(shard.nbytes for shard in self._shards.values())
        return 8 * stored / self.config.num_parameters()

    def verify(self) -> None:
        """Hash every file that was not hashed yet.

        Raises:
            BundleError: a file was changed or damaged.
        """
        self._verify(self.manifest.files)

    def names(self) -> tuple[str, ...]:
        """Quantized tensors, then arrays."""
        return (*self.manifest.tensors, *self.manifest.arrays)

    def quant(self, name: str) -> QuantTensor:
        """A quantized tensor in canonical order."""
        record = self._record(name)
        return self._shard(record.file).quant(name, record)

    def rows(self, name: str, start: int, stop: int) -> QuantTensor:
        """Rows `start:stop` of a quantized tensor; no more is read than the blocks they lie in."""
        record = self._record(name)
        return self._shard(record.file).rows(name, record, start, stop)

    def raw(self, name: str) -> tuple[NDArray[np.uint8], TensorRecord]:
        """A quantized tensor in its layout: (blocks, bytes of a block), mapped read-only."""
        record = self._record(name)
        return self._shard(record.file).raw(name), record

    def pieces(self, name: str) -> Iterator[QuantTensor]:
        """Consecutive rows of a quantized tensor, in pieces of about `PIECE` weights."""
        blocks, record = self.raw(name)
        rows, cols = record.shape
        height = record.order.row_block(record.spec)
        step = max(1, PIECE // (height * cols))
        for start in range(0, len(blocks), step):
            count = min(step * height, rows - start * height)
            yield record.order.untile(blocks[start : start + step], (count, cols), record.spec)

    def array(self, name: str) -> NDArray[np.float32]:
        if name not in self.manifest.arrays:
            raise BundleError(f"{self.path}: {name} is no array of this bundle")
        return self._shard(self.manifest.arrays[name].file).array(name)

    def layer(self, layer: int) -> dict[str, QuantTensor | NDArray[np.float32]]:
        """Role within a layer -> linear weight (out, in), norm gain, or what is kept.

        Experts are left out; `rows` reads some of a stack.
        """
        experts, roles = self.config.expert_roles(layer), self.config.linear_shapes(layer)
        weights: dict[str, QuantTensor | NDArray[np.float32]] = {
            role: self.quant(layer_tensor(layer, role)) for role in roles if role not in experts
        }
        for role in self.config.norm_shapes(layer):
            weights[role] = self.array(gain_name(layer_tensor(layer, role)))
        for role in self.config.kept_shapes(layer):
            weights[role] = self.array(layer_tensor(layer, role))
        return weights

    def towers(self) -> dict[str, TowerTensor]:
        """Vision and audio towers by the source's names; empty if the bundle holds none."""
        if TOWERS not in self.manifest.files:
            return {}
        self._verify([TOWERS])
        with _readable(self.path / TOWERS):
            return open_towers(self.path / TOWERS)

    def asset(self, name: str) -> bytes:
        """Content of a file of the bundle, hashed as it is read.

        Raises:
            BundleError: there is no such file, or it was changed.
        """
        if name not in self.manifest.files:
            raise BundleError(f"{self.path}: has no {name}")
        with _readable(self.path / name):
            data = (self.path / name).read_bytes()
        self._require_hash(name, hashlib.sha256(data).hexdigest())
        return data

    def tokenizer(self) -> Tokenizer:
        data = self.asset("tokenizer.json")
        return Tokenizer.from_bytes(data, self.config.bos_token_id, self.config.eos_token_ids)

    def _record(self, name: str) -> TensorRecord:
        if name not in self.manifest.tensors:
            raise BundleError(f"{self.path}: {name} is no quantized tensor of this bundle")
        return self.manifest.tensors[name]

    def _shard(self, file: str) -> Shard:
        self._verify([file])
        return self._shards[file]

    def _verify(self, names: Iterable[str]) -> None:
        fresh = {name: self.path / name for name in names if name not in self._verified}
        with _readable(self.path):
            hashes = hash_files(fresh)
        for name, digest in hashes.items():
            self._require_hash(name, digest)
            self._verified.add(name)

    def _require_hash(self, name: str, digest: str) -> None:
        if digest != self.manifest.files[name].sha256:
            raise BundleError(
                f"{self.path / name}: its hash differs from {MANIFEST}: the file was changed or "
                "damaged; copy or download it again"
            )


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turn an `OSError` of reading into a `BundleError`."""
    try:
        yield
    except OSError as error:
        raise BundleError(f"{error.filename or path}: cannot be read: {error.strerror}") from error


def _read_manifest(root: Path) -> tuple[Manifest, str]:
    for name in (MANIFEST, CHECKSUM):
        if not (root / name).is_file():
            raise BundleError(f"{root}: has no {name}; not a bundle, or an incomplete copy")
    size = (root / MANIFEST).stat().st_size
    if size > MAX_JSON:
        raise BundleError(f"{root / MANIFEST}: {size} bytes, more than {MAX_JSON}")
    data = (root / MANIFEST).read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    with (root / CHECKSUM).open("rb") as file:
        line = file.read(256)
    if line != checksum_line(digest):
        raise BundleError(
            f"{root / MANIFEST}: differs from {CHECKSUM}: one of them was changed or damaged; "
            "copy or download the bundle again"
        )
    return parse_manifest(data), digest


def _check_file(root: Path, name: str, record: FileRecord) -> None:
    """`name` is a regular file inside `root`, of the listed size."""
    path = root / name
    if not path.exists():
        raise BundleError(f"{path}: is missing, but {MANIFEST} lists it; copy the bundle again")
    home = cached_repository(root) or root
    if not path.resolve().is_relative_to(home.resolve()):
        raise BundleError(f"{path}: is a link out of the bundle; copy the bundle with its files")
    status = path.stat()
    if not S_ISREG(status.st_mode):
        raise BundleError(f"{path}: is not a regular file")
    if status.st_size != record.size:
        raise BundleError(
            f"{path}: {status.st_size} bytes, but {MANIFEST} lists {record.size}; copy or download "
            "it again"
        )
