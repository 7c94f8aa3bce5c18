"""The command `uq`: finds the subcommand, runs it, and turns every failure into one line.

Exit codes: 0 done; 1 the work failed or a threshold was missed; 2 the command was used wrongly;
70 a defect of uq; 130 interrupted (Ctrl-C, SIGTERM); 141 the reader of stdout went away.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import io
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from typing import NoReturn

from uq import __version__
from uq.commands import (
    bench,
    chat,
    compare,
    completion,
    doctor,
    export,
    generate,
    inspect,
    npu,
    publish,
    quantize,
    serve,
    sweep,
    validate,
)
from uq.commands.examples import epilog
from uq.errors import UqError, UsageError
from uq.interrupt import forget_interrupts, interrupt

COMMANDS = {
    "quantize": (quantize, "read a Gemma checkpoint and write a quantized bundle"),
    "sweep": (sweep, "try several recipes on a model, to choose one"),
    "validate": (validate, "compare a bundle with its float32 reference"),
    "generate": (generate, "continue a text with a bundle"),
    "chat": (chat, "talk to a bundle in the terminal"),
    "serve": (serve, "answer HTTP requests with a bundle, as OpenAI's API does"),
    "inspect": (inspect, "show what is in a checkpoint or a bundle"),
    "bench": (bench, "measure how fast a bundle runs"),
    "compare": (compare, "put the reports of several bundles side by side"),
    "export": (export, "write a bundle back for transformers, vLLM or llama.cpp"),
    "publish": (publish, "put a validated bundle on the Hugging Face Hub"),
    "npu": (npu, "check, compile and run designs for the NPU"),
    "doctor": (doctor, "show what this machine offers and what is wrong with it"),
    "completion": (completion, "print a script that completes commands in the shell"),
}
DEFECT, INTERRUPTED, PIPE_CLOSED = 70, 130, 141
ENDINGS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Parser(argparse.ArgumentParser):
    """Argument errors become one line like any other error."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see {self.prog} --help")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; only `--help` and `--version` raise SystemExit."""
    arguments = sys.argv[1:] if argv is None else argv
    _open_closed_streams()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a model may say what the terminal cannot show
    try:
        with _interrupting():
            args = build_parser().parse_args(arguments)
            args.command_line = ("uq", *arguments)
            code: int = args.run(args)
            sys.stdout.flush()
            return code
    except (Exception, KeyboardInterrupt) as error:
        return _fail(error)


def build_parser() -> Parser:
    about = "Quantize, package and validate Gemma for AMD Ryzen AI machines."
    parser = Parser(prog="uq", description=about, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"uq {__version__}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, (command, summary) in COMMANDS.items():
        subparser = subparsers.add_parser(
            name,
            help=summary,
            description=f"{summary[0].upper()}{summary[1:]}.",
            epilog=epilog(name),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        command.configure(subparser)
        subparser.set_defaults(run=command.run)
    return parser


def explain(error: BaseException) -> tuple[str, int]:
    """The line for the user (empty: say nothing) and the exit code."""
    match error:
        case UqError():
            return str(error), error.exit_code
        case KeyboardInterrupt():
            return "interrupted", INTERRUPTED
        case BrokenPipeError():
            return "", PIPE_CLOSED
        case MemoryError():
            return ": ".join(["out of memory", *map(str, error.args)]) + "; close other programs", 1
        case OSError(errno=errno.ENOSPC):
            return f"no space left on the disk{_where(error)}; free some and run it again", 1
        case OSError(strerror=str(reason)):
            return f"{reason}{_where(error)}", 1
        case ModuleNotFoundError(name=str(name)) if not name.startswith("uq"):
            return f"package {name} is not installed; run: pip install {name}", 1
    detail = f"{type(error).__name__}: {error}"
    advice = "run with UQ_DEBUG=1 for the traceback and report it"
    return f"internal error: {detail}; {advice}", DEFECT


def _fail(error: BaseException) -> int:
    message, code = explain(error)
    with contextlib.suppress(OSError):
        if os.environ.get("UQ_DEBUG") == "1":
            traceback.print_exception(error)
        if message:
            print("uq:", " ".join(message.split()), file=sys.stderr)
    _abandon_stdout()
    return code


def _where(error: OSError) -> str:
    return f": {error.filename}" if error.filename else ""


def _open_closed_streams() -> None:
    """Who starts uq without them (`>&-`, some daemons) has nobody to read them."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115, until the process ends


def _abandon_stdout() -> None:
    """Send what stdout cannot take to the null device: the interpreter flushes once more."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextlib.contextmanager
def _interrupting() -> Iterator[None]:
    """SIGTERM and a terminal that is closed clean up as Ctrl-C does; what is ignored stays so.

    Signals can be set in the main thread only.
    """
    usual = (signal.SIG_DFL, signal.default_int_handler)
    before = {number: signal.getsignal(number) for number in ENDINGS}
    if threading.current_thread() is not threading.main_thread():
        before = {}
    taken = {number: handler for number, handler in before.items() if handler in usual}
    for number in taken:
        signal.signal(number, interrupt)
    try:
        yield
    finally:
        forget_interrupts()
        for number, handler in taken.items():
            signal.signal(number, handler)
