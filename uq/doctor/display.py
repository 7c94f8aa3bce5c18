"""Findings for a terminal: one block for each area, a mark and a colour for each level."""

from __future__ import annotations

import shutil
import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby

from uq.doctor.finding import Finding, Level
from uq.machine import Machine
from uq.text import table
from uq.validate.table import GREEN, PLAIN, RED, YELLOW

BOLD, FAINT = "\x1b[1m", "\x1b[2m"
NARROWEST, WIDEST = 16, 100
MARKS = {Level.OK: "✓", Level.NOTE: "·", Level.WARNING: "!", Level.PROBLEM: "✗"}
IN_ASCII = str.maketrans("✓·✗", "+-x")
COLOURS = {Level.OK: GREEN, Level.NOTE: FAINT, Level.WARNING: YELLOW, Level.PROBLEM: RED}
TITLES = {"uq": "uq", "vulkan": "GPU", "npu": "NPU", "xrt": "XRT", "toolchain": "NPU compiler"}


def display(
    machine: Machine, findings: Iterable[Finding], *, colour: bool, ascii_only: bool = False
) -> str:
    """Facts, devices, findings by area, and the sum."""
    pen = Pen(colour, ascii_only)
    found = tuple(findings)
    sections = [table(_facts(machine)), _devices(machine, pen)]
    for area, group in groupby(found, key=lambda finding: finding.area):
        lines = [line for finding in group for line in _finding(finding, pen)]
        sections.append("\n".join([pen.paint(TITLES[area], BOLD), *lines]))
    return "\n\n".join([*sections, _sum(found, pen)])


@dataclass(frozen=True)
class Pen:
    """Paints and marks as the terminal can show it."""

    colour: bool
    ascii_only: bool

    def paint(self, text: str, colour: str) -> str:
        return f"{colour}{text}{PLAIN}" if self.colour and text else text

    def mark(self, level: Level) -> str:
        mark = MARKS[level].translate(IN_ASCII) if self.ascii_only else MARKS[level]
        return self.paint(mark, COLOURS[level])


def _facts(machine: Machine) -> Iterator[tuple[str, str]]:
    threads = f"{machine.cores} cores, {machine.threads} threads usable"
    yield "uq", f"{machine.uq}, Python {machine.python}"
    yield "System", machine.system
    yield "CPU", f"{machine.cpu}, {threads}"
    yield "Features", " ".join(machine.features) or "none that the kernels use"


def _devices(machine: Machine, pen: Pen) -> str:
    lines = [pen.paint("Devices", BOLD)]
    width = max(map(len, machine.backends))
    for name, found in machine.backends.items():
        level = Level.OK if found.available else Level.NOTE
        text = f"{'available' if found.available else 'not available'}: {found.reason}"
        lines += _block(f"{name:{width}}  {text}", pen.mark(level), hang=width + 2)
    return "\n".join(lines)


def _finding(finding: Finding, pen: Pen) -> Iterator[str]:
    """What; unless all is well also why and what to type. Commands are not broken into lines."""
    yield from _block(finding.what, pen.mark(finding.level))
    if finding.level is Level.OK:
        return
    yield from (pen.paint(line, FAINT) for line in _block(finding.why, " "))
    if finding.advice:
        yield f"      {pen.paint(finding.advice, BOLD)}"
    yield from (pen.paint(line, FAINT) for line in _block(finding.then, " "))


def _block(text: str, mark: str, hang: int = 0) -> list[str]:
    columns = shutil.get_terminal_size((WIDEST, 24)).columns
    width = max(NARROWEST, min(WIDEST, columns) - 4)
    lines = textwrap.wrap(
        text, width, subsequent_indent=" " * hang, break_long_words=False, break_on_hyphens=False
    )
    return [f"  {mark if number == 0 else ' '} {line}" for number, line in enumerate(lines)]


def _sum(findings: tuple[Finding, ...], pen: Pen) -> str:
    counts = Counter(finding.level for finding in findings)
    named = [
        pen.paint(f"{counts[level]} {level}{'s' * (counts[level] > 1)}", COLOURS[level])
        for level in (Level.PROBLEM, Level.WARNING)
        if counts[level]
    ]
    line = ", ".join(named) or pen.paint("nothing is wrong", GREEN)
    repairs = len({finding.repair for finding in findings if finding.repair})
    return line + f"; uq doctor --fix offers to mend {repairs}" * bool(repairs)
