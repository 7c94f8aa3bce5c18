"""A job while it runs: its tokens, its text, and what it has still to report."""

from __future__ import annotations

import time

import numpy as np
from numpy.typing import NDArray

from uq.formats.tokenizer import Tokenizer
from uq.kernels.sampling import sample
from uq.serve.job import Finish, Job, Score, Sink, Update
from uq.serve.scores import score
from uq.serve.stops import StopText


class Sequence:
    """
    Attributes:
        tokens: the prompt and what was generated.
        cached: tokens at its beginning that were in the KV cache before.
        arrived: in seconds of `time.perf_counter`.
        gone: whether nobody waits for it any more; set by any thread.
        finish: None while it runs.
    """

    def __init__(self, job: Job, tokenizer: Tokenizer, sink: Sink) -> None:
        self.job, self.tokens, self.cached = job, list(job.prompt), 0
        self.arrived = time.perf_counter()
        self.gone = False
        self.finish: Finish | None = None
        self._sink, self._eos = sink, tokenizer.eos
        self._stream, self._stops = tokenizer.stream(), StopText(job.stop)
        self._text = ""
        self._scores = [Score(job.prompt[0], None)] if job.scores_prompt else []

    @property
    def generated(self) -> int:
        return len(self.tokens) - len(self.job.prompt)

    def wants(self, position: int) -> bool:
        """Whether the logits behind the token at `position` are needed."""
        if position + 1 < len(self.tokens):
            return self.job.scores_prompt
        return self.job.max_tokens > 0

    def receive(self, position: int, logits: NDArray[np.float32]) -> None:
        """Take the logits (vocab,) behind the token at `position`: score or choose the next."""
        if position + 1 < len(self.tokens):
            token = self.tokens[position + 1]
        else:
            token = sample(logits, self.job.sampling, position + 1)
            self.append(token)
        if self.job.logprobs is not None:
            self._scores.append(score(logits, token, self.job.logprobs))

    def report(self) -> None:
        """Tell what is new, or, unless the job is streamed, all of it at the end."""
        if self.finish is None and not (self.job.stream and (self._text or self._scores)):
            return
        scores = tuple(self._scores)
        self._sink(Update(self._text, scores, self.generated, self.cached, self.finish))
        self._text, self._scores = "", []

    def complete(self) -> None:
        """The prompt is through; it may be that nothing is to follow it."""
        if self.job.max_tokens == 0:
            self.finish = "length"

    def fail(self, reason: str) -> None:
        self._sink(Update(generated=self.generated, error=reason))

    def append(self, token: int) -> None:
        """Take the next token."""
        self.tokens.append(token)
        if token in self._eos:
            self._end("stop")
            return
        self._text += self._stops.push(self._stream.push(token))
        if self._stops.reached:
            self.finish = "stop"
        elif self.generated == self.job.max_tokens:
            self._end("length")

    def _end(self, finish: Finish) -> None:
        self._text += self._stops.push(self._stream.flush()) + self._stops.flush()
        self.finish = "stop" if self._stops.reached else finish
