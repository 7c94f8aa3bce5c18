"""Conversations as windows of tokens, for models that were trained on chats.

A `Render` writes messages down by a model's own chat template. Text that is no conversation becomes
one: the user shows the beginning of a piece, and the assistant goes on with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypedDict

import numpy as np
from numpy.typing import NDArray

from uq.errors import UsageError
from uq.formats.decode import parse_json
from uq.formats.tokenizer import Tokenizer

REQUEST = "Continue this text:\n\n"
SHOWN = 1 / 3  # of a piece of text; the rest is the answer
SUFFIX = ".jsonl"  # of a file of conversations


class Message(TypedDict):
    """`role` is `system`, `user` or `assistant`."""

    role: str
    content: str


Conversation = tuple[Message, ...]
Render = Callable[[Sequence[Message]], str]


def read_conversations(name: str, lines: str) -> tuple[Conversation, ...]:
    """Conversations of a JSON lines file: `{"messages": [{"role": ..., "content": ...}, ...]}`.

    User and assistant take turns, the user first. A system message in front is dropped: most
    templates take one at the beginning alone, and a window holds several conversations.

    Raises:
        UsageError: a line is of another form.
    """
    found = []
    for number, line in enumerate(lines.removesuffix("\n").split("\n"), 1):
        try:
            messages = [Message(role=m["role"], content=m["content"]) for m in _messages(line)]
        except (UsageError, TypeError, KeyError) as error:
            raise UsageError(f"{name}: line {number}: no JSON object with `messages`") from error
        turns = messages[1:] if messages[:1] and messages[0]["role"] == "system" else messages
        roles = [message["role"] for message in turns]
        if not roles or len(roles) % 2 or roles != ["user", "assistant"] * (len(roles) // 2):
            raise UsageError(f"{name}: line {number}: user and assistant do not take turns")
        if not all(isinstance(message["content"], str) for message in turns):
            raise UsageError(f"{name}: line {number}: a message whose content is no string")
        found.append(tuple(turns))
    return tuple(found)


def plain(conversations: Iterable[Conversation]) -> str:
    """What was said, for a model that knows no chats."""
    return "\n\n".join(message["content"] for turns in conversations for message in turns)


def continuation(text: str) -> Conversation:
    """A conversation in which the assistant continues a text from a third of it on."""
    third = int(len(text) * SHOWN)
    space = text.find(" ", third, 2 * third)
    cut = third if space < 0 else space
    return (
        Message(role="user", content=REQUEST + text[:cut]),
        Message(role="assistant", content=text[cut:].lstrip()),
    )


def chat_window(
    tokenizer: Tokenizer, render: Render, conversations: Iterable[Conversation], length: int
) -> tuple[NDArray[np.int32], int] | None:
    """`<bos>` and as many conversations, one behind the other, as `length` tokens need.

    Returns:
        The window, (length,) int32, and how many conversations it took; None when all of them are
        too short.
    """
    messages: list[Message] = []
    for count, turns in enumerate(conversations, 1):
        messages += turns
        tokens = tokenizer.encode(render(messages), bos=True)
        if len(tokens) >= length:
            return np.array(tokens[:length], np.int32), count
    return None


def _messages(line: str) -> list[dict[str, str]]:
    messages = parse_json(line.encode("utf-8", "replace"), "line", UsageError)["messages"]
    if not isinstance(messages, list):
        raise TypeError
    return messages
