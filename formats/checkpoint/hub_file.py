"""A weight file that stays on the Hub: parts of it are fetched when they are read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from uq.errors import CheckpointError, HubError
from uq.formats.checkpoint.hub import explain, http_error


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

    @property
    def version(self) -> str:
        return self.digest

    def sha256(self) -> str:
        return self.digest

    def read(self, offset: int, nbytes: int) -> NDArray[np.uint8]:
        """Bytes `offset:offset + nbytes` by one request, retried with growing pauses.

        Raises:
            HubError: the Hub refused, or the network is still down after the last attempt.
        """
        from huggingface_hub import constants, hf_hub_url
        from huggingface_hub.utils import (  # type: ignore[attr-defined]
            build_hf_headers,
            hf_raise_for_status,
            http_backoff,
        )

        if offset + nbytes > self.size:
            raise ValueError(f"{self.name}: {nbytes} bytes at {offset} of {self.size}")
        part = {"Range": f"bytes={offset}-{offset + nbytes - 1}", "Accept-Encoding": "identity"}
        try:
            response = http_backoff(
                "GET",
                hf_hub_url(self.repo, self.name, revision=self.commit),
                headers=build_hf_headers() | part,
                follow_redirects=True,  # whatever client an application has set
                timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
            )
            hf_raise_for_status(response)
        except (http_error(), OSError, ValueError) as error:
            raise HubError(explain(self.repo, self.commit, error)) from error
        data = np.frombuffer(response.content, np.uint8)
        if response.status_code != 206 or data.size != nbytes:
            raise HubError(
                f"{self.repo}: {self.name}: asked for {nbytes} bytes at {offset}, got {data.size} "
                f"with status {response.status_code}; a proxy may be in the way, try --keep"
            )
        return data


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
