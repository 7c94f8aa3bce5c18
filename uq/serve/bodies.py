"""Bodies of requests, as OpenAI specifies them. What the server cannot do is refused by name.

https://platform.openai.com/docs/api-reference/completions and .../chat
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

TokenId = Annotated[int, Field(ge=0, strict=True)]
MAX_LOGPROBS = 20


class Fields(BaseModel):
    """An object whose fields are null where the client leaves them to the server."""

    @model_validator(mode="before")
    @classmethod
    def without_null(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        return {key: value for key, value in data.items() if value is not None}


class StreamOptions(Fields):
    model_config = ConfigDict(extra="forbid")

    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class Body(Fields):
    """What both kinds of requests have in common.

    `user`, `metadata`, `store` and `service_tier` are for OpenAI's own books and have no effect.
    Fields with a `Literal` are accepted with the value that changes nothing.
    """

    model_config = ConfigDict(extra="forbid")

    model: str | None = None
    temperature: float = Field(1.0, ge=0, le=100, allow_inf_nan=False)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    n: int = Field(1, ge=1, le=128)
    stop: str | list[str] | None = Field(None, max_length=1000)
    stream: bool = False
    stream_options: StreamOptions | None = None
    frequency_penalty: Literal[0] | None = 0
    presence_penalty: Literal[0] | None = 0
    logit_bias: dict[str, Literal[0]] | None = None
    user: str | None = None
    metadata: Mapping[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def with_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class CompletionBody(Body):
    """`prompt`: a text or token ids, or a list of these."""

    prompt: str | list[TokenId] | list[str] | list[list[TokenId]]
    max_tokens: int = Field(16, ge=0)
    echo: bool = False
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    best_of: int | None = None
    suffix: None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        if all(isinstance(item, int) for item in self.prompt):
            return [list(self.prompt)]  # type: ignore[arg-type]
        return list(self.prompt)  # type: ignore[arg-type]


class TextPart(Fields):
    model_config = ConfigDict(extra="forbid")

    type: Literal["text"]
    text: str


class ChatMessage(BaseModel):
    model_config = ConfigDict(extra="ignore")  # assistants' messages come back with much beside

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]

    @property
    def text(self) -> str:
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)


class ResponseFormat(BaseModel):
    type: Literal["text"]


class ChatBody(Body):
    messages: list[ChatMessage] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=MAX_LOGPROBS)
    response_format: ResponseFormat | None = None
    tools: list[Any] | None = Field(None, max_length=0)
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None


def explain(error: ValidationError) -> tuple[str, str | None]:
    """One line about what is wrong, and the field it is in.

    Of the alternatives of a field the one that was followed deepest is what was meant.
    """
    errors = error.errors(include_url=False, include_context=False)
    same = [found for found in errors if found["loc"][:1] == errors[0]["loc"][:1]]
    found = max(same, key=lambda found: len(found["loc"]))
    place = ".".join(str(part) for part in found["loc"] if not is_alternative(part))[:60]
    field = str(found["loc"][0]) if found["loc"] else None
    if found["type"] == "extra_forbidden":
        return f"{place}: this server does not have this option", field
    shown = (
        f", not {found['input']!r:.60}" if found["type"] not in ("missing", "json_invalid") else ""
    )
    return f"{place or 'body'}: {found['msg'].lower()}{shown}", field


def is_alternative(part: int | str) -> bool:
    """Whether a part of pydantic's path is the name of a type and not of a field."""
    return isinstance(part, str) and (part == "str" or "[" in part)
