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
from itertools import chain, islice, repeat
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from uq.errors import HubError, UsageError
from uq.formats.chat import (
    SUFFIX,
    Conversation,
    Render,
    chat_window,
    continuation,
    plain,
    read_conversations,
)
from uq.formats.tokenizer import Tokenizer

MIX = Path(__file__).parent / "calibration" / "mix.toml"
HUB_PREFIX = "hub:"
FEW_TOKENS = 32  # different ones; a page of prose has more
LETTERS = 1.1  # characters per token: prose has 3 to 5, Chinese 1.5, unknown scripts less than 1


@dataclass(frozen=True)
class Text:
    """A text, or a mix of texts, and the name under which a manifest mentions it.

    Attributes:
        share: of the windows of the mix that this text is a part of, relative to its siblings.
        parts: of a mix, whose own `content` is empty.
        conversations: of a chat, whose `content` is what they say.
    """

    name: str
    content: str = ""
    share: float = 1.0
    parts: tuple[Text, ...] = ()
    conversations: tuple[Conversation, ...] = ()

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

    A `.jsonl` file holds conversations, as in `read_conversations`.

    Raises:
        UsageError: the file cannot be read as UTF-8 or as conversations, or the name is malformed.
        HubError: the Hub does not give the file.
    """
    if source is None:
        return read_mix(MIX)
    path = _download(source) if source.startswith(HUB_PREFIX) else Path(source)
    try:
        return _text(source, path)
    except OSError as error:
        raise UsageError(f"{source}: cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{source}: not UTF-8 text ({error.reason})") from error


def read_mix(path: Path) -> Text:
    """A mix of groups of texts, from a table of shares beside the texts.

    Each section is a group: `share` of the mix, and `texts`, name -> share of the group. The text
    of a name is `NAME.txt` or, of conversations, `NAME.jsonl`.
    """
    groups = tomllib.loads(path.read_text("utf-8"))
    return Text(
        "default mix",
        parts=tuple(
            Text(
                name,
                share=group["share"],
                parts=tuple(
                    _text(text, next(path.parent.glob(f"{text}.*")), share)
                    for text, share in group["texts"].items()
                ),
            )
            for name, group in groups.items()
        ),
    )


def token_sequences(
    tokenizer: Tokenizer,
    text: Text,
    *,
    sequences: int,
    length: int,
    seed: int | None = None,
    render: Render | None = None,
) -> NDArray[np.int32]:
    """Windows of the text that do not overlap, each behind its own `<bos>`.

    Of a mix, the first n windows have its shares as nearly as n allows, for every n.

    Args:
        sequences: at most this many windows; fewer when the text is shorter.
        length: tokens of a window, `<bos>` included; at least 2.
        seed: None spreads the windows evenly, a number draws their places at random.
        render: writes each window as a chat, cut to `length`; None leaves it a text.

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
    leaves = {leaf.name: leaf for leaf in text.leaves()}
    windows = []
    for name in order:
        first = next(starts[name])
        window = tokens[name][first : first + width]
        if render is None:
            windows.append(np.insert(window, 0, tokenizer.bos))
        else:
            place = first / len(tokens[name])
            windows.append(_as_chat(tokenizer, render, leaves[name], window, place))
    return np.stack(windows)


def text_notes(
    tokenizer: Tokenizer, text: Text, windows: NDArray[np.int32], sequences: int
) -> tuple[str, ...]:
    """What is strange about the windows of a text, a line each, for a user to look at.

    Args:
        windows: of `token_sequences`.
        sequences: how many were asked for.
    """
    notes = []
    count, length = windows.shape
    if count < sequences:
        notes.append(
            f"{text.name} has {count} sequences of {length} tokens; {sequences} were wanted"
        )
    if (different := np.unique(windows).size) < min(FEW_TOKENS, windows.size // 2):
        notes.append(f"{text.name} repeats itself: {different} different tokens")
    letters = sum(len(tokenizer.decode(window.tolist())) for window in windows) / windows.size
    if letters < LETTERS:
        notes.append(
            f"{text.name} has {letters:.2f} characters per token: the tokenizer spells it out; is "
            "it in a language of the model?"
        )
    return tuple(notes)


def _as_chat(
    tokenizer: Tokenizer, render: Render, text: Text, window: NDArray[np.int32], place: float
) -> NDArray[np.int32]:
    """A window as a chat: the conversations around `place` of 1, or a text and its continuation."""
    talks = text.conversations or (continuation(tokenizer.decode(window.tolist())),)
    first = int(place * len(talks))
    # Around the end, and again and again where all of them are shorter than a window.
    turns = islice(chain.from_iterable(repeat(talks)), first, first + len(window))
    found = chat_window(tokenizer, render, turns, len(window) + 1)
    if found is None:
        raise UsageError(f"{text.name}: the chat template leaves nothing of the text")
    return found[0]


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


def _text(name: str, path: Path, share: float = 1.0) -> Text:
    content = path.read_bytes().decode()  # line ends as they are
    if path.suffix != SUFFIX:
        return Text(name, content, share)
    conversations = read_conversations(name, content)
    return Text(name, plain(conversations), share, conversations=conversations)


def _download(source: str) -> Path:
    from huggingface_hub import hf_hub_download

    from uq.formats.checkpoint.hub import explain, http_error, quiet_unless_terminal

    parts = source.removeprefix(HUB_PREFIX).split("/")
    if len(parts) < 3 or not all(parts):
        raise UsageError(f"{source}: not of the form hub:OWNER/DATASET/FILE")
    repo, file = "/".join(parts[:2]), "/".join(parts[2:])
    quiet_unless_terminal()
    try:
        return Path(hf_hub_download(repo, file, repo_type="dataset"))
    except (http_error(), OSError, ValueError) as error:
        raise HubError(explain(f"datasets/{repo}", None, error)) from error
