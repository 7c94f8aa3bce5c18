"""A user's message as the model was trained to see it: the chat template of a bundle."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NoReturn

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from uq.errors import BundleError, UsageError

TEMPLATE = "chat_template.jinja"
CONFIG = "tokenizer_config.json"
CHAT_FILES = (TEMPLATE, CONFIG)


def chat_prompt(assets: Mapping[str, bytes], message: str) -> str:
    """Text of a conversation that holds one user message and asks the model to answer.

    The template comes with the model, so it runs in a sandbox: it can neither import nor change
    anything. Its variables are those of Hugging Face's `apply_chat_template`.

    Args:
        assets: file name -> content; the template is `chat_template.jinja`, else the key
            `chat_template` of `tokenizer_config.json`.

    Raises:
        UsageError: there is no template: a base model, most likely.
        BundleError: the template or `tokenizer_config.json` is broken.
    """
    config = _tokenizer_config(assets)
    template = _find_template(assets, config)
    tokens = {name: _piece(config.get(name)) for name in ("bos_token", "eos_token")}
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = _refuse
    messages = [{"role": "user", "content": message}]
    try:
        return environment.from_string(template).render(
            messages=messages, add_generation_prompt=True, **tokens
        )
    except Exception as error:  # the template is foreign code and may raise anything
        raise BundleError(f"chat template: {type(error).__name__}: {error}") from error


def _tokenizer_config(assets: Mapping[str, bytes]) -> dict[str, Any]:
    if CONFIG not in assets:
        return {}
    try:
        data = json.loads(assets[CONFIG])
    except ValueError as error:
        raise BundleError(f"{CONFIG}: not JSON: {error}") from None
    if not isinstance(data, dict):
        raise BundleError(f"{CONFIG}: expected an object, found {type(data).__name__}")
    return data


def _find_template(assets: Mapping[str, bytes], config: Mapping[str, Any]) -> str:
    if TEMPLATE in assets:
        return assets[TEMPLATE].decode("utf-8", errors="replace")
    template = config.get("chat_template")
    if isinstance(template, list):  # several named templates; the plain one is "default"
        named = [entry for entry in template if isinstance(entry, dict)]
        template = next((e.get("template") for e in named if e.get("name") == "default"), None)
    if not isinstance(template, str):
        raise UsageError("the bundle has no chat template (a base model?); run it without --chat")
    return template


def _piece(token: Any) -> str:
    """Text of a special token, stored as a string or as an object with `content`."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else ""


def _refuse(message: str) -> NoReturn:
    raise TemplateError(message)
