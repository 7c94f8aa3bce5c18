"""`uq generate`: continue a text with a bundle."""

from __future__ import annotations

import argparse
import io
import sys

from uq.commands.arguments import bundle, whole
from uq.commands.sampling import (
    add_device,
    add_sampling,
    add_speculate,
    read_numerics,
    read_sampling,
)


def configure(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("bundle", type=bundle, metavar="BUNDLE", help="folder written by uq quantize, or Hub id")
    add("-p", "--prompt", required=True, metavar="TEXT", help="text to continue; - reads stdin")
    add("--chat", action="store_true", help="put the text into the model's chat template")
    add("--max-tokens", type=whole(1), default=256, metavar="N", help="default: %(default)s")
    add_sampling(parser)
    add_speculate(parser)
    add_device(parser)


def run(args: argparse.Namespace) -> int:
    from uq.generation import generate
    from uq.kernels.backends import first_run_note
    from uq.text import duration

    if note := first_run_note(args.device):
        print(note, file=sys.stderr)
    try:
        generated = generate(
            args.bundle,
            read_stdin() if args.prompt == "-" else args.prompt,
            chat=args.chat,
            max_tokens=args.max_tokens,
            sampling=read_sampling(args),
            device=args.device,
            threads=args.threads,
            numerics=read_numerics(args),
            speculate=args.speculate,
            write=write,
        )
    except KeyboardInterrupt:
        print(flush=True)  # the message does not follow the text on its line
        raise
    print()
    sys.stdout.flush()
    for label, rate in ("prefill", generated.prefill), ("decode", generated.decode):
        took = f"{rate.tokens} tokens in {duration(rate.seconds)}"
        print(f"{label}: {took}, {rate.per_second:.1f} tokens/s", file=sys.stderr)
    for place in generated.device.attention:
        print(place, file=sys.stderr)
    if not generated.device.has_clock:
        print("rates of the emulator: they say nothing about an NPU", file=sys.stderr)
    return 0


def read_stdin() -> str:
    """Stdin without the line feed that `echo` and editors put at the end."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8", errors="replace")
    return sys.stdin.read().removesuffix("\n")


def write(text: str) -> None:
    """Show a piece of text at once, also in a pipe."""
    sys.stdout.write(text)
    sys.stdout.flush()
