"""`uq chat`: talk to a bundle in the terminal."""

from __future__ import annotations

import argparse
import contextlib
import io
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from uq.commands.arguments import bundle, whole
from uq.commands.generate import write
from uq.commands.sampling import (
    add_device,
    add_sampling,
    add_speculate,
    read_numerics,
    read_sampling,
)
from uq.errors import UqError, UsageError

if TYPE_CHECKING:
    from uq.conversation import Conversation, Turn

HELP = "Ctrl-C stops an answer; /reset begins anew; /exit or Ctrl-D ends"
NOTES = {
    "length": "stopped at --max-tokens",
    "context": "the context is full; older messages will be forgotten, /reset begins anew",
    "interrupted": "stopped",
}


def configure(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("bundle", type=bundle, metavar="BUNDLE", help="folder written by uq quantize, or Hub id")
    add("--system", metavar="TEXT", help="what the model is told before the first message")
    add(
        "--template", type=Path, metavar="FILE",
        help="chat template (jinja) in place of the model's own",
    )  # fmt: skip
    add(
        "--context", type=whole(2), default=4096, metavar="N",
        help="tokens that the chat can hold; default: %(default)s, or the model's if less",
    )  # fmt: skip
    add(
        "--max-tokens", type=whole(1), default=1024, metavar="N",
        help="longest answer; default: %(default)s",
    )  # fmt: skip
    add_sampling(parser)
    add_speculate(parser)
    add_device(parser)


def run(args: argparse.Namespace) -> int:
    from uq.chat import ChatTemplate
    from uq.conversation import Conversation
    from uq.formats.bundle import open_bundle
    from uq.kernels.backends import first_run_note, open_session

    model = open_bundle(args.bundle)
    with ChatTemplate.of(model, read_template(args.template)) as template:
        template.start()  # it gets ready while the model is loaded
        if args.template is not None:
            template.try_out()
        if note := first_run_note(args.device):
            print(note, file=sys.stderr)
        context = min(args.context, model.config.max_position_embeddings)
        session = open_session(
            model,
            args.device,
            max_context=context,
            threads=args.threads,
            numerics=read_numerics(args),
            speculate=args.speculate,
        )
        conversation = Conversation(
            session,
            model.tokenizer(),
            template,
            sampling=read_sampling(args),
            max_tokens=args.max_tokens,
            system=args.system,
        )
        if sys.stdin.isatty():
            print(f"{model.name} on {session.device.name}. {HELP}.", file=sys.stderr)
        talk(conversation, messages())
    return 0


def talk(conversation: Conversation, lines: Iterator[str]) -> None:
    """Answer message after message; what goes wrong with one is said in a line."""
    for line in lines:
        match line.strip():
            case "":
                pass
            case "/exit":
                return
            case "/reset":
                conversation.reset()
                print("(forgotten)", file=sys.stderr)
            case command if command.startswith("/"):
                print(f"({command.split()[0]} is not known; {HELP})", file=sys.stderr)
            case message:
                answer(conversation, message)


def answer(conversation: Conversation, message: str) -> None:
    try:
        with interrupts() as stopped:
            turn = conversation.ask(message, write, stopped)
    except UqError as error:
        print(f"uq: {error}", file=sys.stderr)
        return
    print(flush=True)
    print(f"({'; '.join(remarks(turn))})", file=sys.stderr)


def remarks(turn: Turn) -> Iterator[str]:
    """What is to be said about a turn: what was lost first, the speed last."""
    if turn.forgotten:
        yield f"the context was full: the oldest {turn.forgotten} messages are forgotten"
    if turn.ended in NOTES:
        yield NOTES[turn.ended]
    rate = turn.decode
    read = f"{turn.prefill.tokens} new tokens read at {turn.prefill.per_second:.1f} tokens/s"
    yield f"{read}, {rate.tokens} written at {rate.per_second:.1f} tokens/s"


def messages() -> Iterator[str]:
    """Lines of a person, with editing and a history, or of a pipe. Ctrl-C drops a line."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8", errors="replace")
    if not sys.stdin.isatty():
        yield from sys.stdin
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # `input` uses it once it is imported
    while True:
        try:
            yield input("> ")
        except KeyboardInterrupt:
            print(f"\n({HELP})", file=sys.stderr)
        except EOFError:
            print()
            return


@contextlib.contextmanager
def interrupts() -> Iterator[Callable[[], bool]]:
    """Collect Ctrl-C inside; the result says whether it came. A second one is not collected."""
    came: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if came:
            raise KeyboardInterrupt
        came.append(number)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: bool(came)
    finally:
        signal.signal(signal.SIGINT, before)


def read_template(path: Path | None) -> str | None:
    if path is None:
        return None
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise UsageError(f"--template {path}: cannot be read: {reason}") from None
