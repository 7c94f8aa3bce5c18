"""A chat whose KV cache holds what was said, so that only new words are run through the model."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from uq.chat import ChatTemplate, Message
from uq.errors import UsageError
from uq.formats.tokenizer import Tokenizer
from uq.generation import Rate
from uq.kernels.session import Sampling, Session

CHUNK = 512  # tokens between two looks at whether to stop

Ended = Literal["stop", "length", "context", "interrupted"]


@dataclass(frozen=True)
class Turn:
    """How an answer came about.

    Attributes:
        ended: `stop`: by the model; `length`: by `max_tokens`; `context`: it is full.
        forgotten: messages that were dropped from the history because it did not fit any more.
        prefill: of the tokens that were not in the KV cache yet.
    """

    ended: Ended
    forgotten: int
    prefill: Rate
    decode: Rate


class Conversation:
    """Messages and answers. What a prompt shares with the KV cache is not computed again.

    Attributes:
        messages: the history, without the system message; grows by two with every answer.
    """

    def __init__(
        self,
        session: Session,
        tokenizer: Tokenizer,
        template: ChatTemplate,
        *,
        sampling: Sampling,
        max_tokens: int,
        system: str | None = None,
    ) -> None:
        self._session, self._tokenizer, self._template = session, tokenizer, template
        self._sampling, self._max_tokens = sampling, max_tokens
        self._system: list[Message] = [{"role": "system", "content": system}] if system else []
        self.messages: list[Message] = []
        self._cached: tuple[str, ...] = ()  # what the KV cache stands for, in either spelling

    def reset(self) -> None:
        """Forget everything but the system message."""
        self.messages = []
        self._forget_cache()

    def ask(self, message: str, write: Callable[[str], None], stopped: Callable[[], bool]) -> Turn:
        """Answer a message, piece by piece into `write`, until `stopped()` says so.

        An answer that was stopped is kept as far as it came; a message that was stopped before the
        first word of its answer is not.

        Raises:
            UsageError: the message alone is longer than the context; the history is unchanged.
            BundleError: the template refuses the conversation.
        """
        history, prompt, new = self._fit([*self.messages, {"role": "user", "content": message}])
        forgotten = len(self.messages) + 1 - len(history)
        began = time.perf_counter()
        if not self._prefill(new, stopped):
            self._forget_cache()
            seconds = time.perf_counter() - began
            return Turn("interrupted", 0, Rate(len(new), seconds), Rate(0, 0.0))
        filled = time.perf_counter()
        tokens: list[int] = []
        ended = self._answer(tokens, write, stopped)
        decode = Rate(len(tokens), time.perf_counter() - filled)
        self._cached = self._spellings(prompt, tokens)
        answer: Message = {"role": "assistant", "content": self._tokenizer.decode(tokens)}
        self.messages = [*history, answer]
        return Turn(ended, forgotten, Rate(len(new), filled - began), decode)

    def _fit(self, history: list[Message]) -> tuple[list[Message], str, list[int]]:
        """As much of the history as leaves room for an answer, its text, and its new tokens."""
        context = self._session.max_context
        room = max(1, min(self._max_tokens, context // 4))
        for first in range(0, len(history), 2):  # a question goes together with its answer
            kept = history[first:]
            prompt = self._template.render([*self._system, *kept])
            new = self._uncached(prompt)
            if self._session.position + len(new) + room <= context:
                return kept, prompt, new
            self._forget_cache()
        raise UsageError(
            f"the message needs {len(new)} tokens and an answer {room}, but the context has "
            f"{context}; send less, or start with a larger --context"
        )

    def _uncached(self, prompt: str) -> list[int]:
        """Tokens to run behind the KV cache, which is emptied unless the prompt continues it."""
        for cached in self._cached:
            if prompt.startswith(cached) and len(prompt) > len(cached):
                return self._tokenizer.encode(prompt[len(cached) :], bos=False)
        self._forget_cache()
        return self._tokenizer.encode(prompt)

    def _spellings(self, prompt: str, tokens: list[int]) -> tuple[str, ...]:
        """A prompt and its answer, as it was said and as templates like to write it: trimmed.

        The cache keeps what the model said, to the blank.
        """
        ended = tokens[-1] in self._tokenizer.eos
        end = self._tokenizer.decode(tokens[-1:], special=True) if ended else ""
        answer = self._tokenizer.decode(tokens[: len(tokens) - ended], special=True)
        return prompt + answer + end, prompt + answer.strip() + end

    def _prefill(self, tokens: list[int], stopped: Callable[[], bool]) -> bool:
        """Whether it came to the end."""
        for first in range(0, len(tokens), CHUNK):
            if stopped():
                return False
            self._session.prefill(tokens[first : first + CHUNK])
        return True

    def _answer(
        self, tokens: list[int], write: Callable[[str], None], stopped: Callable[[], bool]
    ) -> Ended:
        """Append the answer to `tokens`, the one that ends it included."""
        stream = self._tokenizer.stream()
        try:
            for token in self._session.decode(self._max_tokens, self._sampling):
                tokens.append(token)
                if token in self._tokenizer.eos:
                    return "stop"
                write(stream.push(token))
                if stopped():
                    return "interrupted"
        finally:
            write(stream.flush())
        return "length" if len(tokens) == self._max_tokens else "context"

    def _forget_cache(self) -> None:
        self._session.reset()
        self._cached = ()
