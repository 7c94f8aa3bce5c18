"""From the body of a request to jobs: templates, tokens, limits."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Sequence
from dataclasses import dataclass

from uq.chat import ChatTemplate, Message
from uq.errors import BundleError
from uq.formats.tokenizer import Tokenizer
from uq.kernels.session import Sampling
from uq.serve.bodies import Body, ChatBody, CompletionBody
from uq.serve.errors import ApiError
from uq.serve.job import Job


@dataclass(frozen=True)
class Order:
    """The jobs of one request: `n` of each prompt, one prompt after the other.

    Attributes:
        echoed: for each job the text of its prompt where it is to be repeated, else empty.
    """

    jobs: Sequence[Job]
    echoed: Sequence[str]
    n: int

    @property
    def prompt_lengths(self) -> list[int]:
        return [len(job.prompt) for job in self.jobs[:: self.n]]


class Service:
    """What a server knows of its model.

    Attributes:
        name: of the model, as clients call it.
        capacity: jobs that one request may bring.
    """

    def __init__(
        self,
        name: str,
        tokenizer: Tokenizer,
        template: ChatTemplate | None,
        *,
        max_context: int,
        capacity: int,
    ) -> None:
        """`template`: None for a base model."""
        self.name, self.tokenizer, self.capacity = name, tokenizer, capacity
        self._template, self._max_context = template, max_context
        self._rendering = threading.Lock()
        self._longest = tokenizer.longest

    @property
    def can_chat(self) -> bool:
        return self._template is not None

    def completion(self, body: CompletionBody) -> Order:
        """
        Raises:
            ApiError: a token does not exist, or there are too many.
        """
        self._check_model(body)
        if body.best_of not in (None, body.n):
            raise ApiError(400, "best_of: this server has it equal to n only", param="best_of")
        self._check_count(len(body.prompts) * body.n)
        jobs = []
        echoed = []
        for prompt in body.prompts:
            tokens = self._tokens(prompt)
            self._check_room(len(tokens), body.max_tokens)
            jobs += self._jobs(body, tokens, body.max_tokens, body.logprobs, body.echo)
            text = prompt if isinstance(prompt, str) else self.tokenizer.decode(tokens)
            echoed += [text if body.echo else ""] * body.n
        return Order(jobs, echoed, body.n)

    def chat(self, body: ChatBody) -> Order:
        """
        Raises:
            ApiError: there is no template, it refuses the messages, or they are too long.
        """
        self._check_model(body)
        self._check_count(body.n)
        tokens = self._encode(self._render(body))
        wanted = body.max_completion_tokens or body.max_tokens
        self._check_room(len(tokens), wanted or 1)
        count = wanted or self._max_context - len(tokens)
        jobs = self._jobs(body, tokens, count, body.top_logprobs if body.logprobs else None, False)
        return Order(jobs, [""] * body.n, body.n)

    def _check_count(self, answers: int) -> None:
        if answers > self.capacity:
            advice = "send fewer at a time, or start uq serve with a larger --queue"
            raise ApiError(400, f"{answers} answers, more than {self.capacity}; {advice}")

    def _jobs(
        self, body: Body, tokens: list[int], count: int, logprobs: int | None, echo: bool
    ) -> list[Job]:
        """`body.n` jobs with one prompt; the seeds follow each other."""
        seed = secrets.randbits(63) if body.seed is None else body.seed
        return [
            Job(
                prompt=tuple(tokens),
                max_tokens=count,
                sampling=Sampling(body.temperature, body.top_k, body.top_p, seed + index),
                stop=body.stops,
                logprobs=logprobs,
                echo=echo,
                stream=body.stream,
            )
            for index in range(body.n)
        ]

    def _tokens(self, prompt: str | list[int]) -> list[int]:
        """Text gets `<bos>` in front; token ids are taken as they are."""
        if isinstance(prompt, str):
            return self._encode(prompt)
        unknown = next((token for token in prompt if token >= self.tokenizer.size), None)
        if not prompt or unknown is not None:
            found = "no token" if not prompt else f"token {unknown} of {self.tokenizer.size}"
            raise ApiError(400, f"prompt: {found}; use the model's own tokenizer", param="prompt")
        return prompt

    def _encode(self, text: str) -> list[int]:
        """One that cannot fit is not encoded: that takes seconds in which nobody is served."""
        self._check_room(len(text.encode("utf-8", "replace")) // self._longest, 0)
        return self.tokenizer.encode(text)

    def _render(self, body: ChatBody) -> str:
        if self._template is None:
            raise ApiError(
                400, f"{self.name} is a base model without a chat template; use /v1/completions"
            )
        messages: list[Message] = [
            {
                "role": "system" if message.role == "developer" else message.role,
                "content": message.text,
            }
            for message in body.messages
        ]
        try:
            with self._rendering:  # a template answers one question after the other
                return self._template.render(messages)
        except BundleError as error:
            raise ApiError(400, str(error), param="messages") from None

    def _check_model(self, body: Body) -> None:
        if body.model not in (None, self.name):
            message = f"model {body.model!r} is not here; this server has {self.name!r}"
            raise ApiError(404, message, param="model", code="model_not_found")

    def _check_room(self, prompt: int, answer: int) -> None:
        if prompt + answer > self._max_context:
            raise ApiError(
                400,
                f"{prompt} tokens of prompt and {answer} of answer do not fit into the context of "
                f"{self._max_context}; send less, or start uq serve with a larger --context",
                code="context_length_exceeded",
            )
