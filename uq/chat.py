"""Messages as the model was trained to see them: the chat template of a bundle."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection, Pipe
from types import TracebackType
from typing import Any

from uq.errors import BundleError, UsageError
from uq.formats.bundle import Bundle
from uq.formats.chat import Message as Message
from uq.formats.decode import parse_json

TEMPLATE = "chat_template.jinja"
CONFIG = "tokenizer_config.json"
CHAT_FILES = (TEMPLATE, CONFIG)
ENVIRONMENT = ("PATH", "PYTHONPATH", "PYTHONHOME", "LD_LIBRARY_PATH", "SYSTEMROOT", "TZ", "LANG")
SECONDS = 10.0  # for one rendering, which takes milliseconds
MAX_SOURCE = 1 << 20
MAX_TEXT = 64 << 20  # bytes of a rendered text


class ChatTemplate:
    """A chat template, running in a process that it can neither leave nor fill; close it after use.

    Its variables are those of Hugging Face's `apply_chat_template`.
    """

    def __init__(self, source: str, tokens: Mapping[str, str], *, seconds: float = SECONDS) -> None:
        """
        Args:
            source: the template.
            tokens: `bos_token` and `eos_token`, as text.
            seconds: how long a rendering may take.

        Raises:
            BundleError: the template is longer than any real one.
        """
        if len(source) > MAX_SOURCE:
            raise BundleError(f"chat template: {len(source)} characters, more than {MAX_SOURCE}")
        self._source, self._tokens, self._seconds = source, dict(tokens), seconds
        self._worker: subprocess.Popen[bytes] | None = None
        self._pipe: Connection | None = None

    @classmethod
    def from_assets(cls, assets: Mapping[str, bytes], source: str | None = None) -> ChatTemplate:
        """The template among the files of a model.

        Args:
            assets: file name -> content; the template is `chat_template.jinja`, else the key
                `chat_template` of `tokenizer_config.json`.
            source: a template to take in place of the model's own.

        Raises:
            UsageError: there is no template: a base model, most likely.
            BundleError: `tokenizer_config.json` is broken.
        """
        config = _tokenizer_config(assets)
        tokens = {name: _piece(config.get(name)) for name in ("bos_token", "eos_token")}
        return cls(find_template(assets) if source is None else source, tokens)

    @classmethod
    def of(cls, bundle: Bundle, source: str | None = None) -> ChatTemplate:
        """`from_assets` with the files of a bundle."""
        names = (name for name in CHAT_FILES if name in bundle.manifest.files)
        return cls.from_assets({name: bundle.asset(name) for name in names}, source)

    def start(self) -> None:
        """Start the process now, so that the first rendering need not wait for it."""
        if self._worker is not None:
            return
        self._pipe, theirs = Pipe()
        with theirs:
            # -P: a json.py in the current folder, perhaps the model's own, is not imported.
            command = [sys.executable, "-P", "-m", "uq.sandbox", str(theirs.fileno())]
            # A session of its own: Ctrl-C stops the answer and must not stop this process.
            self._worker = subprocess.Popen(
                command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL, start_new_session=True, env=_without_secrets(),
            )  # fmt: skip
        self._pipe.send_bytes(json.dumps(self._source).encode())

    def render(self, messages: Sequence[Message], *, reply: bool = True) -> str:
        """Text of a conversation.

        Args:
            reply: ask the model to answer; else the conversation ends with its last message.

        Raises:
            BundleError: the template is broken, refuses these messages, or takes too much time or
                memory.
        """
        self.start()
        assert self._pipe is not None
        absent = {"tools": None, "documents": None}  # as templates that ask for them expect it
        variables = {"messages": messages, "add_generation_prompt": reply, **absent, **self._tokens}
        try:
            self._pipe.send_bytes(json.dumps(variables).encode())
            if not self._pipe.poll(self._seconds):
                self.close()
                raise BundleError(f"chat template: took longer than {self._seconds:g} s")
            answer = json.loads(self._pipe.recv_bytes(MAX_TEXT))
        except (OSError, EOFError):  # the process ended, or its answer was too long
            self.close()
            raise BundleError("chat template: took more memory than a text needs") from None
        if "error" in answer:
            raise BundleError(f"chat template: {' '.join(answer['error'].split())[:500]}")
        return str(answer["text"])

    def try_out(self) -> None:
        """Render a message of a user, before anybody waits for an answer.

        Raises:
            BundleError: as `render`.
        """
        self.render([{"role": "user", "content": "hello"}])

    def close(self) -> None:
        """End the process; a later rendering starts a new one."""
        if self._worker is not None and self._pipe is not None:
            self._pipe.close()
            self._worker.kill()
            self._worker.wait()
            self._worker = self._pipe = None

    def __enter__(self) -> ChatTemplate:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def _without_secrets() -> dict[str, str]:
    """What Python needs to start: no token of the Hub, no key of anything."""
    return {name: os.environ[name] for name in ENVIRONMENT if name in os.environ}


def _tokenizer_config(assets: Mapping[str, bytes]) -> dict[str, Any]:
    if CONFIG not in assets:
        return {}
    data = parse_json(assets[CONFIG], CONFIG)
    if not isinstance(data, dict):
        raise BundleError(f"{CONFIG}: expected an object, found {type(data).__name__}")
    return data


def find_template(assets: Mapping[str, bytes]) -> str:
    """The source of the template among the files of a model.

    Raises:
        UsageError: there is none.
        BundleError: `tokenizer_config.json` is broken.
    """
    if TEMPLATE in assets:
        return assets[TEMPLATE].decode("utf-8", errors="replace")
    template = _tokenizer_config(assets).get("chat_template")
    if isinstance(template, list):  # several named templates; the plain one is "default"
        named = [entry for entry in template if isinstance(entry, dict)]
        template = next((e.get("template") for e in named if e.get("name") == "default"), None)
    if not isinstance(template, str):
        raise UsageError(
            "the bundle has no chat template: a base model, which continues texts and does not "
            "answer; use uq generate without --chat, or give a template with uq chat --template"
        )
    return template


def _piece(token: Any) -> str:
    """Text of a special token, stored as a string or as an object with `content`."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else ""
