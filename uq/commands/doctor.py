"""`uq doctor`: show what this machine offers."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from uq.machine import Machine


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    from uq.machine import examine

    machine = examine()
    print(json.dumps(asdict(machine), indent=2) if args.json else describe(machine))
    missing = [name for name, version in machine.packages.items() if version is None]
    return 1 if missing else 0


def describe(machine: Machine) -> str:
    from uq.text import size, table

    threads = f"{machine.cores} cores, {machine.threads} threads usable"
    memory = f"{size(machine.memory)}, {size(machine.memory_available)} available"
    facts = [
        ("uq", machine.uq),
        ("Python", machine.python),
        ("System", machine.system),
        ("CPU", f"{machine.cpu}, {threads}"),
        ("Features", " ".join(machine.features) or "none that the kernels use"),
        ("Memory", memory),
        ("Disk here", f"{size(machine.disk_free)} free"),
    ]
    packages = [
        (name, version or f"MISSING; run: pip install {name}")
        for name, version in machine.packages.items()
    ]
    backends = [
        (name, f"{'available' if found.available else 'not available'}: {found.reason}")
        for name, found in machine.backends.items()
    ]
    sections = {"": facts, "Packages": packages, "Backends": backends}
    return "\n\n".join(f"{title}\n{table(rows)}".strip() for title, rows in sections.items())
