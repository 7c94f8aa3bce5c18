"""The calibration text and its token sequences.

The default, `calibration.txt`, is the first part of the Jargon File 4.4.7, a public-domain glossary
of hackers' English: its paragraphs of more than 160 characters, each joined to one line.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from uq.errors import HubError, UsageError
from uq.formats.tokenizer import Tokenizer

DEFAULT = Path(__file__).with_name("calibration.txt")
HUB_PREFIX = "hub:"


@dataclass(frozen=True)
class Text:
    """A text and the name under which a manifest mentions it."""

    name: str
    content: str

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content.encode()).hexdigest()


def read_text(source: str | None) -> Text:
    """The default text, a file, or `hub:OWNER/DATASET/FILE` of the Hugging Face Hub.

    Raises:
        UsageError: the file cannot be read as UTF-8, or the name is malformed.
        HubError: the Hub does not give the file.
    """
    if source is None:
        return Text("Jargon File 4.4.7 (default)", DEFAULT.read_text("utf-8"))
    path = _download(source) if source.startswith(HUB_PREFIX) else Path(source)
    try:
        return Text(source, path.read_text("utf-8"))
    except OSError as error:
        raise UsageError(f"{source}: cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{source}: not UTF-8 text ({error.reason})") from error


def token_sequences(
    tokenizer: Tokenizer, text: Text, *, sequences: int, length: int, seed: int | None = None
) -> NDArray[np.int32]:
    """Windows of the text that do not overlap, each behind its own `<bos>`.

    Args:
        sequences: at most this many windows; fewer when the text is shorter.
        length: tokens of a window, `<bos>` included; at least 2.
        seed: None spreads the windows evenly, a number draws their places at random.

    Returns:
        (windows, length) int32.

    Raises:
        UsageError: the text is shorter than one window.
    """
    tokens = np.array(tokenizer.encode(text.content, bos=False), np.int32)
    width = length - 1
    count = min(sequences, len(tokens) // width)
    if count < 1:
        raise UsageError(
            f"{text.name}: {len(tokens)} tokens are less than one calibration sequence of "
            f"{length}; give a longer text"
        )
    starts = _starts(len(tokens), width, count, seed)
    windows = tokens[starts[:, None] + np.arange(width)]
    return np.insert(windows, 0, tokenizer.bos, axis=1)


def _starts(tokens: int, width: int, count: int, seed: int | None) -> NDArray[np.int64]:
    """First tokens of the windows, rising: `count * width` is at most `tokens`."""
    if seed is None:
        return np.linspace(0, tokens - width, count).astype(np.int64)
    gaps = np.random.default_rng(seed).integers(0, tokens - count * width, count, endpoint=True)
    return np.sort(gaps) + width * np.arange(count)


def _download(source: str) -> Path:
    from huggingface_hub import hf_hub_download

    from uq.formats.checkpoint.hub import explain, http_error

    parts = source.removeprefix(HUB_PREFIX).split("/")
    if len(parts) < 3 or not all(parts):
        raise UsageError(f"{source}: not of the form hub:OWNER/DATASET/FILE")
    repo, file = "/".join(parts[:2]), "/".join(parts[2:])
    try:
        return Path(hf_hub_download(repo, file, repo_type="dataset"))
    except (http_error(), OSError, ValueError) as error:
        raise HubError(explain(f"datasets/{repo}", None, error)) from error
