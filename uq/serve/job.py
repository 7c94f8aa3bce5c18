"""What the server asks of the scheduler, and what it gets back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from uq.kernels.session import Sampling

Finish = Literal["stop", "length"]


@dataclass(frozen=True)
class Job:
    """One text to continue.

    Attributes:
        prompt: token ids, as they are: with or without `<bos>`.
        stop: texts in front of which the answer ends.
        logprobs: how many likeliest tokens are listed at each place; None: no probabilities.
        echo: the prompt is part of the answer, so its tokens get probabilities, too.
        stream: every token is reported at once and not only the whole.
    """

    prompt: tuple[int, ...]
    max_tokens: int
    sampling: Sampling
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    echo: bool = False
    stream: bool = False

    @property
    def scores_prompt(self) -> bool:
        return self.echo and self.logprobs is not None


@dataclass(frozen=True)
class Score:
    """Natural logarithm of a token's probability before temperature, top-k and top-p.

    Attributes:
        logprob: None for the first token of a text, which nothing predicts.
        top: the likeliest tokens and theirs, greatest first.
    """

    token: int
    logprob: float | None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Update:
    """What has become of a job since the last one.

    Attributes:
        text: may be empty while a character or a stop text is unfinished.
        scores: of generated tokens, behind those of the prompt where they are asked for.
        generated: tokens so far, an end token included; `cached`: prompt tokens not computed anew.
        finish: why it is over; None while it is not.
        error: what went wrong in the server; the job is over, too.
    """

    text: str = ""
    scores: tuple[Score, ...] = ()
    generated: int = 0
    cached: int = 0
    finish: Finish | None = None
    error: str | None = None

    @property
    def over(self) -> bool:
        return self.finish is not None or self.error is not None


Sink = Callable[[Update], None]
