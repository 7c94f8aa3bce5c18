"""What of an unfinished bundle is already safe on the disk, and what was asked for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from itertools import takewhile
from pathlib import Path

from uq import __version__
from uq.errors import BundleError, UsageError
from uq.formats.decode import decode, parse_json
from uq.formats.disk import hash_files, replace_file
from uq.formats.manifest import SCHEMA, ArrayRecord, FileRecord, TensorRecord

JOURNAL = "journal.json"


@dataclass(frozen=True)
class CommittedShard:
    """A shard that was written, synced and hashed."""

    file: str
    record: FileRecord
    tensors: Mapping[str, TensorRecord]
    arrays: Mapping[str, ArrayRecord]


@dataclass(frozen=True)
class Journal:
    """`identity` decides whether a run may continue another one's work."""

    identity: Mapping[str, object]
    shards: tuple[CommittedShard, ...] = ()

    @classmethod
    def begin(cls, identity: Mapping[str, object], shard_count: int) -> Journal:
        fixed = {"uq": __version__, "schema": SCHEMA, "shards": shard_count}
        normal: dict[str, object] = json.loads(json.dumps({**fixed, **identity}))
        return cls(normal)

    @classmethod
    def load(cls, folder: Path) -> Journal:
        """Raises BundleError: the journal is damaged."""
        path = folder / JOURNAL
        try:
            return decode(cls, parse_json(path.read_bytes(), str(path)), str(path))
        except BundleError as error:
            raise BundleError(f"{error}; pass --restart to begin anew") from error

    def save(self, folder: Path) -> None:
        replace_file(folder / JOURNAL, json.dumps(asdict(self)).encode())

    def require_same(self, wanted: Journal, folder: Path) -> None:
        """Raises UsageError: the work in `folder` was begun for something else; names what."""
        begun, asked = _flat(self.identity), _flat(wanted.identity)
        for key in [*begun, *asked]:
            before, now = begun.get(key, "nothing"), asked.get(key, "nothing")
            if before != now:
                raise UsageError(
                    f"{folder}: was begun with {key} {_short(before)}, now {_short(now)}; ask for "
                    "the same to continue, or pass --restart to begin anew"
                )

    def verified(self, folder: Path) -> Journal:
        """The journal up to the first shard that is missing or changed."""
        present = {s.file: folder / s.file for s in self.shards if (folder / s.file).is_file()}
        hashes = hash_files(present)
        good = takewhile(lambda s: hashes.get(s.file) == s.record.sha256, self.shards)
        return replace(self, shards=tuple(good))


def begun_revision(folder: Path, repository: str) -> str | None:
    """The commit that unfinished work in `folder` was begun with, if it is of this repository."""
    try:
        identity = Journal.load(folder).identity
    except (BundleError, OSError):
        return None
    revision = identity.get("revision")
    same = identity.get("repository") == repository
    return revision if same and isinstance(revision, str) else None


def _flat(value: object, name: str = "") -> dict[str, object]:
    """Nested objects with dotted names: {"a": {"b": 1}} -> {"a.b": 1}."""
    if not isinstance(value, dict):
        return {name: value}
    items = (_flat(v, f"{name}.{key}" if name else key) for key, v in value.items())
    return {key: leaf for item in items for key, leaf in item.items()}


def _short(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 48 else text[:45] + "..."
