"""Everything that stands in the way of a publication, found before anything is sent."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from uq.errors import ThresholdMissed
from uq.formats.bundle import Bundle
from uq.formats.checkpoint.hub import HUB, TOKENS, explain, http_error
from uq.formats.manifest import CHECKSUM, MANIFEST

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import ModelInfo

    from uq.publish.contents import Upload
    from uq.validate.report import Report

UNTOUCHED = frozenset({".gitattributes"})  # what the Hub itself puts into a new repository


@dataclass(frozen=True)
class Target:
    """Where to publish.

    Attributes:
        revision: branch; made if there is none of this name.
        replace: whether other content of the repository may be deleted.
    """

    repo: str
    revision: str = "main"
    private: bool = False
    replace: bool = False


@dataclass(frozen=True)
class Remote:
    """What the repository holds now; `head` is None if it does not exist."""

    head: str | None = None
    private: bool = False
    files: frozenset[str] = frozenset()
    same_bundle: bool = False


def name_problems(repo: str) -> Iterator[str]:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        yield f"{repo}: {str(error).splitlines()[0]}"
    if repo.count("/") != 1:
        yield f"{repo}: not of the form ORG/NAME"


def report_problems(bundle: Bundle, report: Report) -> Iterator[str]:
    """The report is of these bytes, and every limit in it was met."""
    if report.bundle.sha256 != bundle.sha256:
        yield (
            f"report.json: belongs to other bytes ({report.bundle.sha256[:12]}…, the bundle is "
            f"{bundle.sha256[:12]}…); run uq validate {bundle.path} again"
        )
    try:
        report.check()
    except ThresholdMissed as missed:
        yield f"report.json: a limit was missed: {missed}"


def file_problems(files: tuple[Upload, ...]) -> Iterator[str]:
    """Sizes that the Hub can store, names that every file system can."""
    from huggingface_hub.constants import MAX_HTTP_DOWNLOAD_SIZE

    seen: dict[str, str] = {}
    for file in files:
        if file.size > MAX_HTTP_DOWNLOAD_SIZE:
            yield f"{file.name}: {file.size:,} bytes; the Hub takes {MAX_HTTP_DOWNLOAD_SIZE:,}"
        if file.name.split("/")[0] in (".git", ".cache", ".gitattributes"):
            yield f"{file.name}: the Hub keeps this name for itself"
        first = seen.setdefault(file.name.lower(), file.name)
        if first != file.name:
            yield f"{file.name}: differs from {first} in upper and lower case only"


def find_account(api: HfApi) -> dict[str, Any] | None:
    """Who the token belongs to; None without a token, or with one that the Hub does not know."""
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    try:
        found: dict[str, Any] = api.whoami()
    except LocalTokenNotFoundError:
        return None
    except HfHubHTTPError as error:
        if error.response.status_code != 401:
            raise
        return None
    return found


def account_problems(account: dict[str, Any] | None, repo: str) -> Iterator[str]:
    """There is a token, it may write, and its owner belongs to the repository's."""
    from huggingface_hub import get_token

    make = f"make one that may write at {TOKENS} and set HF_TOKEN to it"
    if account is None:
        what = "the Hub does not know this token" if get_token() else "no token"
        yield f"{what}: {make}, or run hf auth login"
        return
    owner = repo.partition("/")[0]
    token: dict[str, Any] = account.get("auth", {}).get("accessToken", {})
    if owner not in {account["name"], *(org["name"] for org in account.get("orgs", ()))}:
        yield f"the token is of {account['name']}, who is not a member of {owner}"
    elif token.get("role") == "read" or (
        token.get("role") == "fineGrained" and not _may_write(token, owner)
    ):
        name = " ".join(filter(None, ("the token", token.get("displayName"))))
        yield f"{name} may not write to {owner}: {make}"


def _may_write(token: dict[str, Any], owner: str) -> bool:
    """Whether a fine-grained token has the permission `repo.write` for something of the owner's."""
    scopes = token.get("fineGrained", {}).get("scoped", ())
    return any(
        "repo.write" in scope.get("permissions", ())
        and scope.get("entity", {}).get("name", "").partition("/")[0] == owner
        for scope in scopes
    )


def base_problems(api: HfApi, base_model: str) -> Iterator[str]:
    """The base model exists, and its licence is accepted for this token."""
    try:
        api.auth_check(base_model)
    except (http_error(), OSError, ValueError) as error:
        yield f"base model: {explain(base_model, None, error)}"


def look(api: HfApi, bundle: Bundle, target: Target) -> Remote:
    """The repository's branch, or `main` where the branch is to be made."""
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    with suppress(RepositoryNotFoundError):
        try:
            found = api.model_info(target.repo, revision=target.revision, files_metadata=True)
        except RevisionNotFoundError:
            found = api.model_info(target.repo, files_metadata=True)
        files = frozenset(sibling.rfilename for sibling in found.siblings or ())
        return Remote(found.sha, bool(found.private), files, _is_same(found, bundle))
    return Remote()


def _is_same(found: ModelInfo, bundle: Bundle) -> bool:
    data = (bundle.path / CHECKSUM).read_bytes()
    oid = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()  # as git names a blob
    return any(s.rfilename == CHECKSUM and s.blob_id == oid for s in found.siblings or ())


def repository_problems(remote: Remote, target: Target) -> Iterator[str]:
    """The repository is new, empty, of this bundle, or may be replaced."""
    others = sorted(remote.files - UNTOUCHED)
    if others and not remote.same_bundle and not target.replace:
        what = "another bundle" if MANIFEST in others else f"{others[0]}"
        yield (
            f"{target.repo}: exists with other content ({len(others)} files: {what}; see "
            f"{HUB}/{target.repo}/tree/{target.revision}); choose another name, or pass --replace"
        )
    if target.private and remote.head and not remote.private:
        yield f"{target.repo}: exists and is public; --private is for a new repository"
