"""What the commands under `uq npu` share: how each is added, and where a design's C++ is."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any


def add_command(
    commands: Any, name: str, about: str, run: Callable[[argparse.Namespace], int]
) -> argparse.ArgumentParser:
    """A subparser whose arguments end in `run`."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=about, description=f"{about[0].upper()}{about[1:]}.", allow_abbrev=False
    )
    parser.set_defaults(npu=run)
    return parser


def add_sources(parser: argparse.ArgumentParser) -> None:
    """Where the C++ of a design's kernels is, and its macros."""
    add = parser.add_argument
    add("--sources", metavar="DIR", type=Path, help="C++ of its kernels (default: beside it)")
    add(
        "--define",
        metavar="NAME=VALUE",
        type=define,
        action="append",
        default=[],
        help="a macro for all of them; may be repeated",
    )


def define(text: str) -> tuple[str, int]:
    name, equals, value = text.partition("=")
    if not name.isidentifier() or not (value.lstrip("-").isdecimal() or not equals):
        raise argparse.ArgumentTypeError(f"expected NAME or NAME=NUMBER, not '{text}'")
    return name, int(value) if equals else 1
