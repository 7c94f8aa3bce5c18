"""`uq serve`: answer HTTP requests with a bundle."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from uq.commands.arguments import bundle, whole
from uq.commands.chat import read_template
from uq.commands.sampling import add_device, read_numerics
from uq.errors import ToolMissing, UsageError

if TYPE_CHECKING:
    from uq.serve.server import Served

KEY_VARIABLE = "UQ_API_KEY"


def configure(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("bundle", type=bundle, metavar="BUNDLE", help="folder written by uq quantize, or Hub id")
    add("--host", default="127.0.0.1", help="default: %(default)s, reached from this machine only")
    add("--port", type=whole(0, 65535), default=8000, help="default: %(default)s; 0: a free one")
    add("--name", help="of the model, as clients call it; default: the folder's")
    add(
        "--api-key-file", type=Path, metavar="FILE",
        help=f"clients must send this key; default: the variable {KEY_VARIABLE}, or none",
    )  # fmt: skip
    add(
        "--parallel", type=whole(1, 512), default=16, metavar="N",
        help="requests computed together; default: %(default)s",
    )  # fmt: skip
    add(
        "--queue", type=whole(1), default=256, metavar="N",
        help="requests that may wait; the next gets 503; default: %(default)s",
    )  # fmt: skip
    add(
        "--context", type=whole(2), default=4096, metavar="N",
        help="tokens of a request and its answer; default: %(default)s, or the model's if less",
    )  # fmt: skip
    add(
        "--allow-origin", type=origin, action="append", default=[], metavar="URL",
        help="a web page there may use it, e.g. https://chat.example; *: any page; default: pages "
        "of this machine",
    )  # fmt: skip
    add(
        "--template", type=Path, metavar="FILE",
        help="chat template (jinja) in place of the model's own",
    )  # fmt: skip
    add_device(parser)


def run(args: argparse.Namespace) -> int:
    """Ctrl-C and SIGTERM are the ordinary ends of a server."""
    try:
        from uq.serve.server import ServeOptions, serve
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("uq"):
            raise
        advice = "run: pip install 'unicorn-quant[serve]'"
        raise ToolMissing(f"uq serve needs the package {error.name}; {advice}") from None
    from uq.formats.bundle import open_bundle
    from uq.kernels.backends import first_run_note

    options = ServeOptions(
        host=args.host,
        port=args.port,
        name=args.name,
        device=args.device,
        threads=args.threads,
        numerics=read_numerics(args),
        parallel=args.parallel,
        queue=args.queue,
        context=args.context,
        key=read_key(args.api_key_file),
        template=read_template(args.template),
        origins=tuple(args.allow_origin),
    )
    if not options.local and not options.key:
        print(f"{args.host}: others can use this server; --api-key-file locks it", file=sys.stderr)
    if note := first_run_note(args.device):
        print(note, file=sys.stderr)
    with contextlib.suppress(KeyboardInterrupt):
        serve(open_bundle(args.bundle), options, announce)
    print("stopped", file=sys.stderr)
    return 0


def origin(text: str) -> str:
    """Of an option: a scheme and a host, as browsers name where a page came from."""
    if text != "*" and not re.fullmatch(r"https?://[^/?#@\s]+", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no origin, as https://chat.example is one")
    return text.lower()


def announce(served: Served) -> None:
    from uq.text import size

    chat = "" if served.can_chat else "; no chat: the model has no chat template"
    print(f"{served.name} on {served.device}{chat}")
    print(f"KV caches: {size(served.cache_bytes)} when all are full")
    print(f"OpenAI API: {served.url}/v1", flush=True)


def read_key(path: Path | None) -> str | None:
    if path is None:
        return os.environ.get(KEY_VARIABLE) or None
    try:
        key = path.read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise UsageError(f"--api-key-file {path}: cannot be read: {reason}") from None
    if not key:
        raise UsageError(f"--api-key-file {path}: is empty; put a key into it")
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise UsageError(f"--api-key-file {path}: holds no key of one line of plain characters")
    return key
