"""`uq doctor`: what this machine offers, what is wrong with it, and the command that mends it."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING

from uq.errors import UsageError

if TYPE_CHECKING:
    from uq.doctor import Finding
    from uq.machine import Machine

MODES = ("default", "powersaver", "balanced", "performance", "turbo")  # of xrt-smi


def configure(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--json", action="store_true", help="print one JSON object")
    add("--fix", action="store_true", help="offer every repair that can be undone, one by one")
    add("--power-mode", choices=MODES, metavar="MODE", help=f"set the NPU's: {', '.join(MODES)}")


def run(args: argparse.Namespace) -> int:
    """1 when there is a problem: something that is there and cannot be used."""
    from uq.doctor import Level, diagnose, this_system
    from uq.doctor.mend import execute, mend, set_power_mode
    from uq.machine import examine

    if args.json and (args.fix or args.power_mode):
        raise UsageError("--json reads and prints; leave out --fix and --power-mode")
    system = this_system()
    if args.power_mode:
        set_power_mode(args.power_mode, system, execute)
        return 0
    machine = examine()
    findings = diagnose(system, machine)
    if args.json:
        shown = asdict(machine) | {"findings": [finding.to_json() for finding in findings]}
        print(json.dumps(shown, indent=2))
    else:
        show(machine, findings)
    if args.fix:
        print(summary(mend(findings, system, ask, execute), findings))
    return 1 if any(finding.level is Level.PROBLEM for finding in findings) else 0


def summary(count: int, findings: tuple[Finding, ...]) -> str:
    """What came of `--fix`, which made `count` repairs."""
    if count:
        return "\nmended; what needs a new login or a reboot shows up after it: uq doctor"
    offered = any(finding.repair for finding in findings)
    return "\nnothing was mended" if offered else "\n--fix has nothing to offer for this machine"


def show(machine: Machine, findings: tuple[Finding, ...]) -> None:
    from uq.doctor.display import display
    from uq.validate.table import wants_colour

    ascii_only = not (sys.stdout.encoding or "").lower().startswith("utf")
    colour = wants_colour(sys.stdout)
    print(display(machine, findings, colour=colour, ascii_only=ascii_only))


def ask(question: str) -> bool:
    """No, unless a person says yes."""
    if not sys.stdin.isatty():
        raise UsageError("--fix asks before every repair; run it in a terminal")
    return input(f"\n{question} [y/N] ").strip().lower() in ("y", "yes")
