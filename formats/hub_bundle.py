"""A bundle on the Hugging Face Hub, downloaded into the ordinary cache."""

from __future__ import annotations

from pathlib import Path

from uq.errors import BundleError
from uq.formats.checkpoint.hub import HUB, quiet_unless_terminal, snapshot
from uq.formats.hub_name import is_hub_id, split_revision
from uq.formats.manifest import CHECKSUM, MANIFEST, REPORT_FILES, parse_manifest


def download_bundle(name: str) -> Path:
    """Folder of the cache with the files of `owner/name` or `owner/name@revision`.

    The manifest comes first, then what it lists. The files still have to be verified.

    Raises:
        HubError: no token, licence not accepted, wrong id or revision, offline, or network.
        BundleError: the repository holds no bundle.
    """
    quiet_unless_terminal()
    repo, revision = split_revision(name)
    folder = snapshot(repo, revision, (MANIFEST, CHECKSUM))
    if not (folder / MANIFEST).is_file():
        raise BundleError(
            f"{repo}: has no {MANIFEST}, so it is no bundle ({HUB}/{repo}); if it is a checkpoint, "
            f"make a bundle of it with: uq quantize {repo}"
        )
    files = parse_manifest((folder / MANIFEST).read_bytes()).files
    return snapshot(repo, folder.name, (MANIFEST, CHECKSUM, *files, *REPORT_FILES))


def download_report(name: str) -> Path:
    """Folder of the cache with the report of a bundle, and its manifest.

    Raises:
        HubError: as `download_bundle`.
    """
    quiet_unless_terminal()
    repo, revision = split_revision(name)
    return snapshot(repo, revision, (MANIFEST, CHECKSUM, *REPORT_FILES))


def is_hub_bundle(name: str, revision: str | None = None) -> bool:
    """Whether a name is that of a repository, not of a folder, and there is a bundle in it.

    Raises:
        HubError: as `download_bundle`.
    """
    if Path(name).exists() or not is_hub_id(name):
        return False
    quiet_unless_terminal()
    return (snapshot(name, revision, (MANIFEST, CHECKSUM)) / MANIFEST).is_file()
