"""Hugging Face Hub: download what is needed of a repository, with errors a person can act on."""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import cast

from uq.errors import CheckpointError, HubError
from uq.formats.checkpoint.hf_config import parse_config, read_json
from uq.formats.checkpoint.safetensors_file import weight_names

HUB = "https://huggingface.co"
TOKENS = f"{HUB}/settings/tokens"
SMALL = ("*.json", "*.jinja", "LICENSE*", "LICENCE*", "NOTICE*", "GEMMA_TERMS*", "USE_POLICY*")
GEMMA3 = ("1b", "4b", "12b", "27b")
GEMMA2 = ("2b", "9b", "27b")
# Sizes that exist under other names than `google/gemma-<version>-<size>`.
SUFFIXES = {
    **{f"gemma-3-{size}": ("-it", "-pt") for size in GEMMA3},
    "gemma-3-270m": ("", "-it"),
    **{f"gemma-2-{size}": ("", "-it") for size in GEMMA2},
    **{f"gemma-{size}": ("", "-it") for size in ("2b", "7b")},
}


def download_small(repo: str, revision: str | None) -> Path:
    """Folder in the Hugging Face cache with all files but the weights; its name is the commit.

    Token, cache folder and offline mode are those of `huggingface_hub`.

    Raises:
        HubError: no token, licence not accepted, wrong id or revision, offline, or network.
        CheckpointError: the repository has no model that can be read.
    """
    quiet_unless_terminal()
    folder = snapshot(repo, revision, SMALL)
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{repo}: has no config.json; see {HUB}/{repo}/tree/main")
    parse_config(read_json(folder / "config.json"), f"{repo}: config.json")
    return folder


def download_weights(repo: str, folder: Path) -> None:
    """Put the weight files into the folder that `download_small` gave.

    Raises:
        HubError: as there.
    """
    snapshot(repo, folder.name, weight_names(folder))


def has_weights(folder: Path) -> bool:
    """Whether an earlier download left all weight files in the cache."""
    return all((folder / name).is_file() for name in weight_names(folder))


def http_error() -> type[Exception]:
    """Base class of every error of the HTTP client, which differs between versions of the Hub's."""
    from huggingface_hub.errors import HfHubHTTPError

    return cast(type[Exception], HfHubHTTPError.__mro__[1])


def quiet_unless_terminal() -> None:
    """No bars in a log; no line for each attempt of a request: the last one is explained."""
    from huggingface_hub import constants
    from huggingface_hub.utils.tqdm import disable_progress_bars

    if "HF_HUB_VERBOSITY" not in os.environ:
        for name in ("huggingface_hub", "urllib3"):
            logging.getLogger(name).setLevel(logging.ERROR)
    if not sys.stderr.isatty() and constants.HF_HUB_DISABLE_PROGRESS_BARS is None:
        disable_progress_bars()


def snapshot(repo: str, revision: str | None, patterns: Sequence[str]) -> Path:
    """Folder in the Hugging Face cache with the files that match; its name is the commit.

    Raises:
        HubError: no token, licence not accepted, wrong id or revision, offline, or network.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=list(patterns)))
    except (http_error(), OSError, ValueError) as error:
        raise HubError(explain(repo, revision, error)) from error


def explain(repo: str, revision: str | None, error: BaseException) -> str:
    """One line: what happened, and the page to open or the setting to change."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    page = f"{HUB}/{repo}"
    match error:
        case GatedRepoError() if error.response.status_code == 401:
            return (
                f"{repo}: needs an accepted licence and a token; accept the licence at {page}, "
                f"then set HF_TOKEN to a token from {TOKENS}"
            )
        case GatedRepoError():
            return f"{repo}: the licence is not accepted for this token; accept it at {page}"
        case RepositoryNotFoundError():
            return f"{repo}: no such model on the Hub, or it is private ({page}){other_ids(repo)}"
        case RevisionNotFoundError():
            return f"{repo}: no revision {revision!r}; see {page}/tree/main for those that exist"
        case LocalEntryNotFoundError() | OfflineModeIsEnabled() if _offline(error):
            return (
                f"{repo}: not in the local cache, and HF_HUB_OFFLINE is set; unset it, or give "
                f"the folder of a copy of {page}"
            )
        case LocalEntryNotFoundError():
            cause = error.__cause__ or error
            return f"{repo}: cannot reach the Hub ({_line(cause)}) to get {page}; try again"
        case HfHubHTTPError() if error.response.status_code == 401:
            return f"{repo}: the Hub refuses the token; set HF_TOKEN to one from {TOKENS}"
        case HfHubHTTPError():
            status = error.response.status_code
            return f"{repo}: the Hub answered {status} for {page} ({_line(error)})"
    if isinstance(error, http_error()):
        return f"{repo}: cannot reach the Hub ({_line(error)}) to get {page}; try again"
    return f"{repo}: failed at {page}: {_line(error)}"


def other_ids(repo: str) -> str:
    """A hint for an id of Google's that lacks its suffix, or has one that does not exist."""
    owner, _, name = repo.partition("/")
    stem = next((s for s in SUFFIXES if re.fullmatch(re.escape(s) + r"(-it|-pt|-base)?", name)), "")
    if owner != "google" or not stem:
        return ""
    return "; these exist: " + ", ".join(f"google/{stem}{suffix}" for suffix in SUFFIXES[stem])


def _offline(error: BaseException) -> bool:
    from huggingface_hub.errors import OfflineModeIsEnabled

    return isinstance(error.__cause__ or error, OfflineModeIsEnabled)


def _line(error: BaseException) -> str:
    """First line of a message, or the kind of error where there is none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
