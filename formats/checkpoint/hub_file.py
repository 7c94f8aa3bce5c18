"""A weight file that stays on the Hub: parts of it are fetched when they are read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from threading import Lock
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray

from uq.errors import CheckpointError, HubError
from uq.formats.checkpoint.hub import HUB, explain, http_error

GONE = (400, 401, 403, 404, 410)  # what stores answer when a signed address has expired


@dataclass(frozen=True)
class HubFile:
    """One file of one commit; `digest` is its SHA-256 as the Hub keeps it.

    The parts that are read are not hashed: that hash is of the whole file.
    """

    repo: str
    commit: str
    name: str
    size: int
    digest: str
    place: Place = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "place", Place(self.repo, self.commit, self.name))

    @property
    def version(self) -> str:
        return self.digest

    @property
    def stated_sha256(self) -> str:
        return self.digest

    def sha256(self) -> str:
        return self.digest

    def read(self, offset: int, nbytes: int) -> NDArray[np.uint8]:
        """Bytes `offset:offset + nbytes` by one request, retried with growing pauses.

        Raises:
            HubError: the Hub refused, or the network is still down after the last attempt.
        """
        from urllib3.exceptions import HTTPError, MaxRetryError

        if offset + nbytes > self.size:
            raise ValueError(f"{self.name}: {nbytes} bytes at {offset} of {self.size}")
        try:
            status, data = self.place.read(offset, nbytes)
        except HTTPError as error:
            reason = error.reason if isinstance(error, MaxRetryError) else error
            raise HubError(
                f"{self.repo}: {self.name}: the transfer broke off ({reason}); try again, or see "
                f"{HUB}/{self.repo}"
            ) from error
        if status != 206 or len(data) != nbytes:
            raise HubError(
                f"{self.repo}: {self.name}: asked for {nbytes} bytes at {offset}, got {len(data)} "
                f"with status {status} ({HUB}/{self.repo}); a proxy may be in the way, try --keep"
            )
        return data


class Place:
    """Where a file of the Hub lies: the Hub's answer is an address, signed for an hour or so."""

    def __init__(self, repo: str, commit: str, name: str) -> None:
        self._repo, self._commit, self._name = repo, commit, name
        self._lock = Lock()
        self._address: str | None = None

    def read(self, offset: int, nbytes: int) -> tuple[int, NDArray[np.uint8]]:
        """Status and bytes of the answer; the Hub is asked again for an address that has expired.

        Raises:
            HubError: the Hub refused or could not be reached.
            urllib3.exceptions.HTTPError: the store of large files could not be.
        """
        from huggingface_hub import constants

        from uq.formats.checkpoint.ranges import read_range

        address = self._find(None)
        for _ in range(2):
            status, data = read_range(
                address, offset, nbytes, self._headers(address), constants.HF_HUB_DOWNLOAD_TIMEOUT
            )
            if status not in GONE:
                break
            address = self._find(address)
        return status, data

    def _find(self, expired: str | None) -> str:
        """The address; asked for at first, and when it is the one that has expired."""
        with self._lock:
            if self._address == expired:
                self._address = self._ask()
            assert self._address is not None
            return self._address

    def _ask(self) -> str:
        """Where the Hub leads a request for the first byte."""
        from huggingface_hub import constants
        from huggingface_hub.utils import (  # type: ignore[attr-defined]
            build_hf_headers,
            hf_raise_for_status,
            http_backoff,
        )

        part = {"Range": "bytes=0-0", "Accept-Encoding": "identity"}
        try:
            response = http_backoff(
                "GET",
                self._url,
                headers=build_hf_headers() | part,
                follow_redirects=True,  # whatever client an application has set
                timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
            )
            hf_raise_for_status(response)
        except (http_error(), OSError, ValueError) as error:
            raise HubError(explain(self._repo, self._commit, error)) from error
        return str(response.url)

    def _headers(self, address: str) -> dict[str, str]:
        """Who asks; the token only where the Hub itself has the file."""
        from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

        ours = urlsplit(address).netloc == urlsplit(self._url).netloc
        return build_hf_headers(token=None if ours else False)

    @property
    def _url(self) -> str:
        from huggingface_hub import hf_hub_url

        return hf_hub_url(self._repo, self._name, revision=self._commit)


def hub_files(repo: str, commit: str, names: Sequence[str]) -> list[HubFile] | None:
    """The named weight files of a commit; None if the Hub does not know the hash of each.

    Raises:
        HubError: the Hub refused or could not be reached.
        CheckpointError: the repository lacks one of them.
    """
    from huggingface_hub import HfApi

    try:
        found = HfApi().model_info(repo, revision=commit, files_metadata=True)
    except (http_error(), OSError, ValueError) as error:
        raise HubError(explain(repo, commit, error)) from error
    siblings = {sibling.rfilename: sibling for sibling in found.siblings or ()}
    for name in names:
        if name not in siblings:
            raise CheckpointError(f"{repo}: has no {name}")
    large = {name: lfs for name in names if (lfs := siblings[name].lfs)}
    if len(large) < len(names):
        return None
    return [HubFile(repo, commit, name, lfs.size, lfs.sha256) for name, lfs in large.items()]
