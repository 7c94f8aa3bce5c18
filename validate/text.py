"""The evaluation text and its token chunks, by the protocol of llama.cpp's perplexity tool.

The text is tokenized as a whole and cut into windows without overlap. BOS takes the place of each
window's first token, and only the second half of a window is scored, so that every scored token
has at least half a window of context.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice, repeat
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from uq.errors import UsageError
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

DEFAULT_TEXT = Path(__file__).with_name("evaluation.txt")
DEFAULT_NAME = "Jargon File 4.4.7 (default)"
MIN_CONTEXT = 4  # the shortest window with a scored position
STRANGE = 1000.0  # perplexity of the reference; prose has 5 to 50, foreign scripts up to 200
KNOWN = 1.2  # likewise: what a model knows by heart, or one line over and over


@dataclass(frozen=True)
class EvaluationText:
    """A text, or what conversations say."""

    name: str
    content: str
    conversations: tuple[Conversation, ...] = ()


def read_text(path: Path | None) -> EvaluationText:
    """A UTF-8 file, of conversations if it ends in `.jsonl`; None is the text shipped with uq.

    Raises:
        UsageError: it cannot be read as such.
    """
    if path is None:
        return EvaluationText(DEFAULT_NAME, DEFAULT_TEXT.read_text("utf-8"))
    try:
        content = path.read_bytes().decode()  # line ends as they are
    except OSError as error:
        raise UsageError(f"--text {path}: cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"--text {path}: not UTF-8 text ({error.reason})") from error
    if path.suffix != SUFFIX:
        return EvaluationText(path.name, content)
    conversations = read_conversations(f"--text {path}", content)
    return EvaluationText(path.name, plain(conversations), conversations)


def text_warnings(perplexity: float) -> tuple[str, ...]:
    """What the reference's own perplexity says of a text that is no use to compare models by."""
    if perplexity > STRANGE:
        return (
            f"text: the reference itself finds it improbable (perplexity {perplexity:.0f}); take "
            "one that the model knows how to read",
        )
    if perplexity < KNOWN:
        return (
            f"text: the reference knows every next word (perplexity {perplexity:.2f}); take one "
            "that does not repeat itself",
        )
    return ()


def windows(
    tokenizer: Tokenizer,
    text: EvaluationText,
    context: int,
    max_chunks: int | None,
    render: Render | None,
) -> NDArray[np.int32]:
    """The first windows of a text, as a chat if there is a `render`: (n, context) int32.

    Raises:
        UsageError: the text is shorter than one window, or a number is too small.
    """
    if render is None:
        return chunks(tokenizer, text.content, context, max_chunks)
    if not text.conversations:
        pieces = chunks(tokenizer, text.content, context, max_chunks)
        return np.stack([_continued(tokenizer, render, piece) for piece in pieces])
    _check(context, max_chunks)
    found = list(islice(_packed(tokenizer, render, text.conversations, context), max_chunks))
    if not found:
        raise UsageError(
            f"the conversations of {text.name} have less than the {context} tokens of a window; "
            "use more of them or a shorter context"
        )
    return np.stack(found)


def chunks(
    tokenizer: Tokenizer, text: str, context: int = 512, max_chunks: int | None = None
) -> NDArray[np.int32]:
    """The first `max_chunks` windows of a text: (n, context) int32.

    Raises:
        UsageError: the text is shorter than one window, or a number is too small.
    """
    _check(context, max_chunks)
    # Nobody vouches for the text: a spelled-out special token in it stays text.
    tokens = np.array(tokenizer.encode(text, bos=True, special=False), np.int32)
    count = min(tokens.size // context, max_chunks or tokens.size)
    if count == 0:
        raise UsageError(
            f"the text has {tokens.size} tokens and a window needs {context}; "
            "use a longer text or a shorter context"
        )
    windows = tokens[: count * context].reshape(count, context)
    windows[:, 0] = tokenizer.bos
    return windows


def scored(context: int) -> slice:
    """Positions of a window whose next token is scored: context / 2 to context - 2."""
    return slice(context // 2, context - 1)


def targets(windows: NDArray[np.int32]) -> NDArray[np.int32]:
    """The tokens that follow the scored positions, window by window: (n * scored,)."""
    positions = scored(windows.shape[1])
    return windows[:, positions.start + 1 : positions.stop + 1].reshape(-1)


def _check(context: int, max_chunks: int | None) -> None:
    if context < MIN_CONTEXT:
        raise UsageError(f"context {context} is too short to score; use at least {MIN_CONTEXT}")
    if max_chunks is not None and max_chunks < 1:
        raise UsageError(f"{max_chunks} chunks leave nothing to score; use at least 1")


def _continued(tokenizer: Tokenizer, render: Render, piece: NDArray[np.int32]) -> NDArray[np.int32]:
    """A window of a text as a chat that continues it, cut to the length it had."""
    text = tokenizer.decode(piece[1:].tolist())
    found = chat_window(tokenizer, render, repeat(continuation(text), piece.size), piece.size)
    if found is None:
        raise UsageError("the chat template leaves nothing of the text")
    return found[0]


def _packed(
    tokenizer: Tokenizer, render: Render, conversations: tuple[Conversation, ...], context: int
) -> Iterator[NDArray[np.int32]]:
    """Windows full of conversations, none of which is used twice."""
    first = 0
    while found := chat_window(tokenizer, render, conversations[first:], context):
        yield found[0]
        first += found[1]
