"""Answers as OpenAI specifies them, whole and in pieces."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from secrets import token_hex
from typing import Any

from uq.formats.tokenizer import Tokenizer
from uq.serve.job import Score, Update

Json = dict[str, Any]


class Offsets:
    """Where in the text of an answer each of its tokens begins, in characters.

    Special tokens are no part of the text; a part of a character begins where the character does.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._stream, self._length = tokenizer.stream(), 0

    def of(self, scores: Iterable[Score]) -> list[int]:
        """Of the tokens that follow those asked for before."""
        return [self._push(score.token) for score in scores]

    def _push(self, token: int) -> int:
        start = self._length
        self._length += len(self._stream.push(token))
        return start


@dataclass
class Tally:
    """What one choice has said so far.

    Attributes:
        text: begins with the prompt where that is to be repeated.
    """

    text: str = ""
    scores: list[Score] = field(default_factory=list)
    generated: int = 0
    cached: int = 0
    finish: str | None = None
    begun: bool = False
    offsets: Offsets | None = None

    def add(self, update: Update) -> None:
        self.begun = True
        self.text += update.text
        self.scores += update.scores
        self.generated, self.cached = update.generated, update.cached
        self.finish = update.finish


@dataclass(frozen=True)
class Form:
    """What every piece of one answer carries.

    Attributes:
        chat: a chat completion; else a text completion.
        logprobs: whether probabilities were asked for.
    """

    model: str
    fingerprint: str
    tokenizer: Tokenizer
    chat: bool
    logprobs: bool
    id: str = field(default_factory=lambda: token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, choices: Sequence[Json], usage: Json) -> Json:
        kind = "chat.completion" if self.chat else "text_completion"
        return self._head(kind) | {"choices": choices, "usage": usage}

    def chunk(self, choices: Sequence[Json], usage: Json | None = None) -> Json:
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        return self._head(kind) | {"choices": choices} | ({"usage": usage} if usage else {})

    def choice(self, index: int, tally: Tally) -> Json:
        scores = self._scores(tally.scores, Offsets(self.tokenizer))
        end = {"index": index, "finish_reason": tally.finish, "logprobs": scores}
        if self.chat:
            return end | {"message": {"role": "assistant", "content": tally.text, "refusal": None}}
        return end | {"text": tally.text}

    def piece(self, index: int, update: Update, *, behind: Tally) -> Json:
        """What a choice says next."""
        behind.offsets = behind.offsets or Offsets(self.tokenizer)
        scores = self._scores(update.scores, behind.offsets)
        end = {"index": index, "finish_reason": update.finish, "logprobs": scores}
        if not self.chat:
            return end | {"text": update.text if behind.begun else behind.text + update.text}
        role = {} if behind.begun else {"role": "assistant"}
        return end | {"delta": role | ({"content": update.text} if update.text else {})}

    def _head(self, kind: str) -> Json:
        prefix = "chatcmpl" if self.chat else "cmpl"
        return {
            "id": f"{prefix}-{self.id}",
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
        }

    def _scores(self, scores: Sequence[Score], offsets: Offsets) -> Json | None:
        if not self.logprobs:
            return None
        return self._chat_scores(scores) if self.chat else self._text_scores(scores, offsets)

    def _chat_scores(self, scores: Sequence[Score]) -> Json:
        def entry(token: int, logprob: float | None) -> Json:
            piece = self.tokenizer.piece(token, special=True)
            return {"token": spelled(piece), "logprob": logprob, "bytes": list(piece)}

        return {
            "content": [
                entry(score.token, score.logprob)
                | {"top_logprobs": [entry(*other) for other in score.top]}
                for score in scores
            ],
            "refusal": None,
        }

    def _text_scores(self, scores: Sequence[Score], offsets: Offsets) -> Json:
        return {
            "tokens": [self._spelled(score.token) for score in scores],
            "token_logprobs": [score.logprob for score in scores],
            "top_logprobs": [self._listed(score) for score in scores],
            "text_offset": offsets.of(scores),
        }

    def _listed(self, score: Score) -> Mapping[str, float] | None:
        """The greatest first; of two tokens that are spelled alike the greater."""
        if score.logprob is None:
            return None
        listed: dict[str, float] = {}
        for token, logprob in score.top:
            listed.setdefault(self._spelled(token), logprob)
        return listed

    def _spelled(self, token: int) -> str:
        return spelled(self.tokenizer.piece(token, special=True))


def spelled(piece: bytes) -> str:
    """The text of a token; `bytes:\\xe4` for one that is a part of a character."""
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)


def usage(prompts: Sequence[int], tallies: Sequence[Tally]) -> Json:
    """`prompts`: lengths of the prompts, each counted once however many answers it got."""
    prompt, generated = sum(prompts), sum(tally.generated for tally in tallies)
    firsts = tallies[:: len(tallies) // len(prompts)]  # of the answers to each prompt
    return {
        "prompt_tokens": prompt,
        "completion_tokens": generated,
        "total_tokens": prompt + generated,
        "prompt_tokens_details": {"cached_tokens": sum(tally.cached for tally in firsts)},
    }
