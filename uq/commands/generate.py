"""`uq generate`: continue a text with a bundle."""

from __future__ import annotations

import argparse
import io
import sys

from uq.commands.arguments import bundle, real, whole
from uq.kernels.backends import DEVICES


def configure(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("bundle", type=bundle, metavar="BUNDLE", help="folder written by uq quantize")
    add("-p", "--prompt", required=True, metavar="TEXT", help="text to continue; - reads stdin")
    add("--chat", action="store_true", help="put the text into the model's chat template")
    add("--max-tokens", type=whole(1), default=256, metavar="N", help="default: %(default)s")
    add(
        "--temperature", type=real(0), default=0.0, metavar="T",
        help="0 (default): always the likeliest token; above: sample",
    )  # fmt: skip
    add("--top-k", type=whole(0), default=0, metavar="K", help="0 (default): all tokens")
    add("--top-p", type=real(0, 1, above=True), default=1.0, metavar="P", help="default: 1")
    add("--seed", type=whole(0, 2**63 - 1), default=0, metavar="S", help="default: %(default)s")
    add("--device", choices=DEVICES, default="auto", help="default: %(default)s")
    add("--threads", type=whole(1), metavar="N", help="default: one per core")


def run(args: argparse.Namespace) -> int:
    from uq.generation import generate
    from uq.kernels.backends import first_run_note
    from uq.kernels.session import Sampling
    from uq.text import duration

    if note := first_run_note(args.device):
        print(note, file=sys.stderr)
    try:
        generated = generate(
            args.bundle,
            read_stdin() if args.prompt == "-" else args.prompt,
            chat=args.chat,
            max_tokens=args.max_tokens,
            sampling=Sampling(args.temperature, args.top_k, args.top_p, args.seed),
            device=args.device,
            threads=args.threads,
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
