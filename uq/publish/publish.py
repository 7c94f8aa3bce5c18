"""From a bundle and its report to a repository of the Hub: all of it, or nothing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from uq.errors import BundleError, HubError, UsageError
from uq.formats.bundle import Bundle, open_bundle
from uq.formats.checkpoint.demo import BASE_MODEL, DEMO
from uq.formats.checkpoint.hub import explain, http_error, quiet_unless_terminal
from uq.publish.card import NOTICE, card_data, missing_fields, render_card
from uq.publish.contents import Upload, uploads
from uq.publish.preflight import (
    UNTOUCHED,
    Remote,
    Target,
    account_problems,
    base_problems,
    file_problems,
    find_account,
    look,
    name_problems,
    report_problems,
    repository_problems,
)
from uq.validate.files import HTML_NAME, load_report
from uq.validate.html import render_html
from uq.validate.plots import figures, standalone
from uq.validate.report import JSON_NAME, Report

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd

TERMS = "GEMMA_TERMS"
MESSAGE = "Publish a bundle made by uq"


@dataclass(frozen=True)
class Publication:
    """What would be published, and what stands in its way.

    Attributes:
        card: text of README.md; empty where there is no report to make it from.
        problems: one sentence each; with any of them nothing is published.
        warnings: what the publisher should know.
    """

    bundle: Bundle
    target: Target
    files: tuple[Upload, ...]
    card: str
    problems: tuple[str, ...]
    warnings: tuple[str, ...]
    remote: Remote


def prepare(
    path: Path,
    target: Target,
    *,
    base_model: str | None = None,
    licence: str = "gemma",
    terms: Path | None = None,
) -> Publication:
    """Put a publication together and check all of it; no weight is read, nothing is sent.

    Args:
        base_model: Hub id; default: the model that the bundle was made from.
        terms: a copy of the licence to be published with the bundle.

    Raises:
        BundleError: the folder is not a bundle, or a broken one.
        UsageError: the terms cannot be read, or are empty.
    """
    quiet_unless_terminal()
    bundle = open_bundle(path, verify="lazy")
    base = base_model or base_of(bundle)
    problems = list(name_problems(target.repo))
    report = _load(bundle, problems)
    data = card_data(bundle, report, base, licence)
    problems += missing_fields(data)
    extra: dict[str, bytes] = {"NOTICE": f"{NOTICE}\n".encode()}
    if terms is not None:
        extra[f"{TERMS}{terms.suffix}"] = read_terms(terms)
    card = ""
    if report is not None:
        problems += report_problems(bundle, report)
        plots = figures(report)
        card = render_card(bundle, report, data, target.repo, plots)
        extra |= {f"plots/{name}.svg": standalone(svg).encode() for name, svg in plots.items()}
        extra |= {"README.md": card.encode(), HTML_NAME: render_html(report, plots).encode()}
        extra[JSON_NAME] = (bundle.path / JSON_NAME).read_bytes()
    own = bundle.manifest.files
    files = uploads(bundle, {name: data for name, data in extra.items() if name not in own})
    problems += file_problems(files)
    remote = Remote()
    if not any(name_problems(target.repo)):
        try:
            found, remote = _ask(bundle, target, base)
        except HubError as error:  # the card and the files can be looked at all the same
            found = [str(error)]
        problems += found
    warnings = tuple(_warnings(report, files))
    return Publication(bundle, target, files, card, tuple(problems), warnings, remote)


def read_terms(path: Path) -> bytes:
    """Raises UsageError: there is nothing in it to publish."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UsageError(f"--terms {path}: cannot be read: {error.strerror}") from None
    if not data.strip():
        raise UsageError(f"--terms {path}: is empty; save the terms into it")
    return data


def base_of(bundle: Bundle) -> str | None:
    """The Hub id of the model that a bundle was made from, where its manifest says it."""
    origin = bundle.manifest.provenance
    if origin.kind == "hub":
        return origin.id
    return BASE_MODEL if origin.id == DEMO else None


def _load(bundle: Bundle, problems: list[str]) -> Report | None:
    try:
        return load_report(bundle.path)
    except BundleError as error:
        problems.append(str(error))
        return None


def _ask(bundle: Bundle, target: Target, base: str | None) -> tuple[list[str], Remote]:
    """What the Hub says about the token, the base model and the repository."""
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        account = find_account(api)
        problems = list(account_problems(account, target.repo))
        if account is None:
            api = HfApi(token=False)  # what anyone may see
        problems += [] if base is None else base_problems(api, base)
        remote = look(api, bundle, target)
    except (http_error(), OSError, ValueError) as error:
        raise HubError(explain(target.repo, target.revision, error)) from error
    return [*problems, *repository_problems(remote, target)], remote


def _warnings(report: Report | None, files: tuple[Upload, ...]) -> Iterator[str]:
    if report is not None and not report.thresholds:
        yield "the report was made without limits (--max-kld, --max-ppl-ratio): none was checked"
    if not any(file.name.startswith((TERMS, "LICENSE", "LICENCE")) for file in files):
        yield (
            "the Gemma terms ask for a copy of themselves in every distribution: save "
            "https://ai.google.dev/gemma/terms and pass --terms FILE"
        )


def publish(publication: Publication) -> str:
    """Send everything, then make it visible by one commit; returns its address.

    Large files come first. One that the Hub has already, from an earlier attempt, is not sent
    again; as long as one is missing there is no commit.

    Raises:
        HubError: something stands in the way, or the upload was broken off.
        BundleError: a file of the bundle was changed or damaged.
    """
    from huggingface_hub import CommitOperationDelete, HfApi

    target, remote, api = publication.target, publication.remote, HfApi()
    if publication.problems:
        count = len(publication.problems)
        raise HubError(f"{target.repo}: not published, {count} problems: {publication.problems[0]}")
    publication.bundle.verify()
    obsolete: frozenset[str] = frozenset()
    if not remote.same_bundle:
        obsolete = remote.files - UNTOUCHED - {file.name for file in publication.files}
    try:
        api.create_repo(target.repo, private=target.private or None, exist_ok=True)
        if target.revision != "main":
            api.create_branch(target.repo, branch=target.revision, exist_ok=True)
        commit = api.create_commit(
            target.repo,
            [
                *(CommitOperationDelete(name) for name in sorted(obsolete)),
                *(_addition(file) for file in publication.files),
            ],
            commit_message=MESSAGE,
            revision=target.revision,
            parent_commit=remote.head,
        )
    except (http_error(), OSError, ValueError, RuntimeError) as error:
        cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
        raise HubError(
            f"{explain(target.repo, target.revision, cause)}; nothing was published, the same "
            "command continues with what is missing"
        ) from error
    return str(commit.commit_url)


def _addition(file: Upload) -> CommitOperationAdd:
    from huggingface_hub import CommitOperationAdd

    addition = CommitOperationAdd(file.name, file.source)
    addition.upload_info.sha256 = bytes.fromhex(file.sha256)  # so that it is not hashed again
    return addition
