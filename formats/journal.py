"""What of an unfinished bundle is already safe on the disk, and what was asked for.

The file is one line of JSON and the SHA-256 of that line: whatever is damaged in it is noticed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from itertools import takewhile
from pathlib import Path

from uq import __version__
from uq.errors import BundleError, UqError, UsageError
from uq.formats.decode import decode, parse_json, printable
from uq.formats.disk import hash_files, replace_file
from uq.formats.manifest import SCHEMA, ArrayRecord, FileRecord, TensorRecord

JOURNAL = "journal.json"
BEGIN_ANEW = "pass --restart to begin anew"


@dataclass(frozen=True)
class CommittedShard:
    """A shard that was written, synced and hashed.

    Attributes:
        sources: hash of each tensor that it was made from.
    """

    file: str
    record: FileRecord
    tensors: Mapping[str, TensorRecord]
    arrays: Mapping[str, ArrayRecord]
    sources: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Journal:
    """`identity` and `facts` decide whether a run may continue another one's work.

    Attributes:
        identity: what was asked for; known from the beginning.
        facts: what else fixes the bytes and became known on the way: the plan, the assets, ...
    """

    identity: Mapping[str, object]
    facts: Mapping[str, object] = field(default_factory=dict)
    shards: tuple[CommittedShard, ...] = ()

    @classmethod
    def begin(cls, identity: Mapping[str, object], shard_count: int) -> Journal:
        fixed = {"uq": __version__, "schema": SCHEMA, "shards": shard_count}
        return cls(_as_json({**fixed, **identity}))

    @classmethod
    def load(cls, folder: Path) -> Journal:
        """
        Raises:
            BundleError: the journal is damaged.
            UsageError: another version of uq wrote it.
        """
        path = folder / JOURNAL
        line, _, digest = path.read_bytes().partition(b"\n")
        if digest != _digest(line):
            raise BundleError(f"{path}: is damaged: its checksum differs; {BEGIN_ANEW}")
        try:
            value = parse_json(line, str(path))
            _require_this_version(value, folder)
            return decode(cls, value, str(path))
        except BundleError as error:
            raise BundleError(f"{error}; {BEGIN_ANEW}") from error

    def save(self, folder: Path) -> None:
        line = json.dumps(asdict(self)).encode()
        replace_file(folder / JOURNAL, line + b"\n" + _digest(line))

    def require_same(self, wanted: Journal, folder: Path) -> None:
        """Raises UsageError: the work in `folder` was begun for something else; names what."""
        _require_equal(self.identity, wanted.identity, folder)

    def confirmed(self, name: str, value: Mapping[str, object], folder: Path) -> Journal:
        """The journal with a fact more.

        Raises:
            UsageError: it is known already, and differs; names what.
        """
        facts = dict(self.facts)
        normal = _as_json(value)
        _require_equal({name: facts.setdefault(name, normal)}, {name: normal}, folder)
        return replace(self, facts=facts)

    @property
    def sources(self) -> dict[str, str]:
        """Hash of each tensor that a shard was made from."""
        return {name: sha256 for shard in self.shards for name, sha256 in shard.sources.items()}

    def require_sources(self, found: Mapping[str, str], folder: Path) -> None:
        """Raises UsageError: a tensor is not what a shard was made from; names it.

        Args:
            found: hashes of some of the tensors in `sources`.
        """
        begun = {name: sha256 for name, sha256 in self.sources.items() if name in found}
        _require_equal({"source": begun}, {"source": dict(found)}, folder)

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
    except (UqError, OSError):
        return None
    revision = identity.get("revision")
    same = identity.get("repository") == repository
    return revision if same and isinstance(revision, str) else None


def _as_json(value: Mapping[str, object]) -> dict[str, object]:
    """As it will come back from the file: a tuple is a list there."""
    normal: dict[str, object] = json.loads(json.dumps(value))
    return normal


def _digest(line: bytes) -> bytes:
    return hashlib.sha256(line).hexdigest().encode() + b"\n"


def _require_this_version(value: object, folder: Path) -> None:
    """Said before the fields are looked at, which another version may have named otherwise."""
    identity = value.get("identity") if isinstance(value, dict) else None
    version = identity.get("uq") if isinstance(identity, dict) else None
    if isinstance(version, str) and version != __version__:
        raise UsageError(
            f"{folder}: was begun by uq {_short(version)}, this is {__version__}: finish it with "
            f"that version, or {BEGIN_ANEW}"
        )


def _require_equal(begun: object, asked: object, folder: Path) -> None:
    before, now = _flat(begun), _flat(asked)
    for key in [*before, *now]:
        old, new = before.get(key, "nothing"), now.get(key, "nothing")
        if old != new:
            raise UsageError(
                f"{folder}: was begun with {printable(key)} {_short(old)}, now {_short(new)}; ask "
                f"for the same to continue, or {BEGIN_ANEW}"
            )


def _flat(value: object, name: str = "") -> dict[str, object]:
    """Nested objects with dotted names: {"a": {"b": 1}} -> {"a.b": 1}."""
    if not isinstance(value, dict):
        return {name: value}
    items = (_flat(v, f"{name}.{key}" if name else key) for key, v in value.items())
    return {key: leaf for item in items for key, leaf in item.items()}


def _short(value: object) -> str:
    text = value if isinstance(value, str) and value.isprintable() else json.dumps(value)
    return text if len(text) <= 64 else text[:61] + "..."
