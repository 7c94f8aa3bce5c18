"""Renders chat templates in a process of its own: `python -m uq.sandbox FD`.

A template is code that came with a model. Jinja's sandbox keeps it from files and from Python's
inside, but not from counting to 10^12 or from writing a string of 100 GB. So it runs where memory
is limited by the system and where it can be killed; see `uq.chat.ChatTemplate`.
"""

from __future__ import annotations

import contextlib
import json
import sys
from datetime import datetime
from functools import cache
from multiprocessing.connection import Connection
from typing import Any, NoReturn

from jinja2 import Template, TemplateError
from jinja2.ext import Extension
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

MEMORY = 512 << 20  # bytes of address space; Python and jinja2 take some 30 MB


def main() -> None:
    """Take the template, then answer every set of variables until the other side closes."""
    limit_process()
    connection = Connection(int(sys.argv[1]))
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        source = json.loads(connection.recv_bytes())
        while True:
            variables = json.loads(connection.recv_bytes())
            connection.send_bytes(json.dumps(answer(source, variables)).encode())


def answer(source: str, variables: dict[str, Any]) -> dict[str, str]:
    """`text`, or `error` with what the template did wrong."""
    try:
        return {"text": compiled(source).render(variables)}
    except Exception as error:  # foreign code may raise anything
        return {"error": f"{type(error).__name__}: {error}"}


@cache
def compiled(source: str) -> Template:
    """The template among the functions that Hugging Face's `apply_chat_template` offers."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(source)


class Generation(Extension):
    """`{% generation %}` marks what the model wrote, for training; here it is what is in it."""

    tags = {"generation"}  # noqa: RUF012, a name of jinja2's

    def parse(self, parser: Parser) -> list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def tojson(
    x: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as text: Jinja's own filter would escape it for HTML."""
    return json.dumps(
        x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def refuse(message: str) -> NoReturn:
    raise TemplateError(message)


def limit_process() -> None:
    if sys.platform != "win32":
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))  # no file grows
        resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))  # no other process


if __name__ == "__main__":
    main()
