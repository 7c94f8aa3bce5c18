"""What every command needs: Python packages, memory, disk, power."""

from __future__ import annotations

import sys
from collections.abc import Iterator

from uq.doctor.finding import Finding, Level, Repair
from uq.doctor.system import System
from uq.machine import Machine
from uq.text import size

MEMORY, DISK = 6 << 30, 4 << 30  # what Gemma 3 1B takes to be quantized, with room to work


def check_resources(system: System, machine: Machine) -> Iterator[Finding]:
    yield from packages(machine)
    yield from memory(machine)
    yield from disk(machine)
    yield from power(system)


def packages(machine: Machine) -> Iterator[Finding]:
    missing = [name for name, version in machine.packages.items() if version is None]
    for name in missing:
        repair = Repair(
            (sys.executable, "-m", "pip", "install", name),
            undo=f"{sys.executable} -m pip uninstall {name}",
            root=False,
        )
        what, why = f"the Python package {name} is MISSING", "uq imports it"
        yield Finding("uq.packages", Level.PROBLEM, what, why, repair=repair)
    if not missing:
        count = len(machine.packages)
        yield Finding("uq.packages", Level.OK, f"all {count} Python packages that uq needs")


def memory(machine: Machine) -> Iterator[Finding]:
    free = machine.memory_available
    what = f"{size(free)} of {size(machine.memory)} of memory are free"
    if free < MEMORY:
        why = "a layer in float32 and its statistics must fit; `uq quantize --dry-run` says the sum"
        yield Finding("uq.memory", Level.WARNING, what, why, "ps aux --sort=-rss | head")
    else:
        yield Finding("uq.memory", Level.OK, what)


def disk(machine: Machine) -> Iterator[Finding]:
    what = f"{size(machine.disk_free)} are free on the disk of this folder"
    if machine.disk_free < DISK:
        why = "bundles and downloads must fit; uq refuses before it begins"
        yield Finding("uq.disk", Level.WARNING, what, why, "du -xh --max-depth=1 . | sort -h")
    else:
        yield Finding("uq.disk", Level.OK, what)


def power(system: System) -> Iterator[Finding]:
    for supply in system.glob("/sys/class/power_supply/*"):
        where = supply.relative_to(system.root)
        if system.text(where / "type") == "Mains" and system.text(where / "online") == "0":
            what = "the machine runs on its battery"
            yield Finding("uq.power", Level.WARNING, what, "it clocks itself down; speeds vary")
    profile = system.text("/sys/firmware/acpi/platform_profile")
    if profile in ("low-power", "quiet", "cool"):
        what, why = f"the machine's power profile is {profile}", "all of its processors are slowed"
        command = "powerprofilesctl set performance"
        yield Finding("uq.power", Level.WARNING, what, why, command)
