"""Calibration texts and their token sequences.

The default is a mix of texts in many languages and programming languages; the folder
`calibration/` has them, their sources and licences, and their shares in `mix.toml`.
"""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from uq.errors import HubError, UsageError
from uq.formats.tokenizer import Tokenizer

MIX = Path(__file__).parent / "calibration" / "mix.toml"
HUB_PREFIX = "hub:"


@dataclass(frozen=True)
class Text:
    """A text, or a mix of texts, and the name under which a manifest mentions it.

    Attributes:
        share: of the windows of the mix that this text is a part of, relative to its siblings.
        parts: of a mix, whose own `content` is empty.
    """

    name: str
    content: str = ""
    share: float = 1.0
    parts: tuple[Text, ...] = ()

    @property
    def sha256(self) -> str:
        """Of a text's UTF-8 bytes; of a mix: of its parts' names, shares and hashes."""
        if not self.parts:
            return hashlib.sha256(self.content.encode()).hexdigest()
        parts = [[part.name, part.share, part.sha256] for part in self.parts]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def leaves(self) -> Iterator[Text]:
        """The texts themselves, in order."""
        if not self.parts:
            yield self
        for part in self.parts:
            yield from part.leaves()


def read_text(source: str | None) -> Text:
    """The default mix, a file, or `hub:OWNER/DATASET/FILE` of the Hugging Face Hub.

    Raises:
        UsageError: the file cannot be read as UTF-8, or the name is malformed.
        HubError: the Hub does not give the file.
    """
    if source is None:
        return read_mix(MIX)
    path = _download(source) if source.startswith(HUB_PREFIX) else Path(source)
    try:
        return Text(source, path.read_text("utf-8"))
    except OSError as error:
        raise UsageError(f"{source}: cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{source}: not UTF-8 text ({error.reason})") from error


def read_mix(path: Path) -> Text:
    """A mix of groups of texts, from a table of shares beside the texts.

    Each section is a group: `share` of the mix, and `texts`, name -> share of the group. The text
    of a name is `NAME.txt`, or `NAME.jsonl` with a list of messages in each line.
    """
    groups = tomllib.loads(path.read_text("utf-8"))
    return Text(
        "default mix",
        parts=tuple(
            Text(
                name,
                share=group["share"],
                parts=tuple(
                    Text(text, _content(path.parent, text), share)
                    for text, share in group["texts"].items()
                ),
            )
            for name, group in groups.items()
        ),
    )


def token_sequences(
    tokenizer: Tokenizer, text: Text, *, sequences: int, length: int, seed: int | None = None
) -> NDArray[np.int32]:
    """Windows of the text that do not overlap, each behind its own `<bos>`.

    Of a mix, the first n windows have its shares as nearly as n allows, for every n.

    Args:
        sequences: at most this many windows; fewer when the text is shorter.
        length: tokens of a window, `<bos>` included; at least 2.
        seed: None spreads the windows evenly, a number draws their places at random.

    Returns:
        (windows, length) int32.

    Raises:
        UsageError: the text is shorter than one window.
    """
    width = length - 1
    tokens = {
        leaf.name: np.array(tokenizer.encode(leaf.content, bos=False), np.int32)
        for leaf in text.leaves()
    }
    room = {name: len(ids) // width for name, ids in tokens.items()}
    count = min(sequences, sum(room.values()))
    if count < 1:
        raise UsageError(
            f"{text.name}: {max(map(len, tokens.values()))} tokens are less than one calibration "
            f"sequence of {length}; give a longer text"
        )
    order = _draw(text, room, count)
    starts = {
        name: iter(_starts(len(ids), width, order.count(name), seed))
        for name, ids in tokens.items()
    }
    windows = []
    for name in order:
        first = next(starts[name])
        windows.append(tokens[name][first : first + width])
    return np.insert(np.stack(windows), 0, tokenizer.bos, axis=1)


def _draw(text: Text, room: Mapping[str, int], count: int) -> list[str]:
    """Names of the leaves that `count` windows come from; `room` is how many each can give."""
    if not text.parts:
        return [text.name] * count
    rooms = [sum(room[leaf.name] for leaf in part.leaves()) for part in text.parts]
    order = apportion([part.share for part in text.parts], rooms, count)
    drawn = [iter(_draw(part, room, order.count(i))) for i, part in enumerate(text.parts)]
    return [next(drawn[i]) for i in order]


def apportion(shares: Sequence[float], room: Sequence[int], count: int) -> list[int]:
    """`count` picks among parties, in turns that hold to the shares all along.

    Sainte-Lague's method of 1910: the next pick goes to the greatest share / (2 picks + 1). Party i
    is left out once it has `room[i]` picks.
    """
    taken = [0] * len(shares)
    order = []
    for _ in range(count):
        able = (i for i in range(len(shares)) if taken[i] < room[i])
        best = max(able, key=lambda i: shares[i] / (2 * taken[i] + 1))
        taken[best] += 1
        order.append(best)
    return order


def _starts(tokens: int, width: int, count: int, seed: int | None) -> NDArray[np.int64]:
    """First tokens of the windows, rising: `count * width` is at most `tokens`.

    Evenly, each window lies in the middle of its 1 / `count` of the text.
    """
    if seed is None:
        return ((np.arange(count) + 0.5) * tokens / max(count, 1) - width / 2).astype(np.int64)
    gaps = np.random.default_rng(seed).integers(0, tokens - count * width, count, endpoint=True)
    return np.sort(gaps) + width * np.arange(count)


def _content(folder: Path, name: str) -> str:
    path = folder / f"{name}.jsonl"
    if not path.is_file():
        return (folder / f"{name}.txt").read_text("utf-8")
    conversations = [json.loads(line)["messages"] for line in path.read_text("utf-8").splitlines()]
    return "\n\n".join(message["content"] for turns in conversations for message in turns)


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
