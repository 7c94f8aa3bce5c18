"""Names of repositories on the Hugging Face Hub, told from paths."""

from __future__ import annotations

import re
from pathlib import Path

SNAPSHOTS, REPOSITORY = "snapshots", "models--"  # of the Hugging Face cache
ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def is_hub_id(name: str) -> bool:
    """Whether a name has the form `owner/name`; a path with a known ending has not."""
    return bool(ID.fullmatch(name)) and not name.endswith((".gguf", ".safetensors", ".json"))


def split_revision(name: str) -> tuple[str, str | None]:
    """`owner/name@revision` -> the id and the revision; None where there is no `@`."""
    repo, _, revision = name.partition("@")
    return repo, revision or None


def cached_repository(folder: Path) -> Path | None:
    """The cache's folder of the repository, if `folder` is one of its snapshots.

    A snapshot consists of links to files of the repository's folder.
    """
    repository = folder.absolute().parent.parent
    inside = folder.absolute().parent.name == SNAPSHOTS
    return repository if inside and repository.name.startswith(REPOSITORY) else None
