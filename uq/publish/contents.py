"""The files of a publication: the bundle's own, the report's, the card and the notice."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from uq.formats.bundle import Bundle
from uq.formats.manifest import CHECKSUM, MANIFEST

Source = Path | bytes


@dataclass(frozen=True)
class Upload:
    """One file of the repository; `sha256` is known without reading a large one."""

    name: str
    source: Source
    size: int
    sha256: str


def uploads(bundle: Bundle, extra: Mapping[str, bytes]) -> tuple[Upload, ...]:
    """All files, by name. Those of the bundle have the hashes that were kept when it was written.

    Args:
        extra: further files, which are not part of the bundle's hashed set.
    """
    return tuple(sorted(_uploads(bundle, extra), key=lambda upload: upload.name))


def _uploads(bundle: Bundle, extra: Mapping[str, bytes]) -> Iterator[Upload]:
    for name, record in bundle.manifest.files.items():
        yield Upload(name, bundle.path / name, record.size, record.sha256)
    own = {name: (bundle.path / name).read_bytes() for name in (MANIFEST, CHECKSUM)}
    for name, data in (own | dict(extra)).items():
        yield Upload(name, data, len(data), hashlib.sha256(data).hexdigest())
