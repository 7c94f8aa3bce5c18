"""`uq completion`: let the shell complete commands, options and file names."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from uq.commands.arguments import bundle

SHELLS = ("bash", "zsh", "tcsh")


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=SHELLS, help="prints a script for it")


def run(args: argparse.Namespace) -> int:
    import shtab

    from uq.cli import build_parser

    parser = build_parser()
    kinds = {Path: shtab.FILE, bundle: shtab.DIRECTORY}
    for action in actions(parser):
        if action.type in kinds:
            action.complete = kinds[action.type]  # type: ignore[attr-defined]
    print(shtab.complete(parser, args.shell))
    return 0


def actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """Arguments of a parser and of all its commands."""
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for child in action.choices.values():
                yield from actions(child)
