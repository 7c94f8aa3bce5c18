"""One thing that was looked at: what was found, why it matters, what to type."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from enum import StrEnum


class Level(StrEnum):
    """`PROBLEM`: a device or package that is there cannot be used. `NOTE`: nothing is wrong."""

    OK = "ok"
    NOTE = "note"
    WARNING = "warning"
    PROBLEM = "problem"


@dataclass(frozen=True)
class Repair:
    """A command that undoes one cause and nothing else.

    Attributes:
        argv: without sudo.
        root: it changes the system, not only what belongs to the user.
        undo: the line that takes it back.
    """

    argv: tuple[str, ...]
    undo: str
    root: bool = True

    def __str__(self) -> str:
        return "sudo " * self.root + shlex.join(self.argv)


@dataclass(frozen=True)
class Finding:
    """What a check found.

    Attributes:
        check: area and subject, such as `npu.firmware`.
        what: one sentence.
        why: what does not work because of it, with the words of the error that one meets.
        command: lines to type; those of a repair when there is one.
        then: what is left to do by hand behind the command.
        repair: what `uq doctor --fix` offers to run.
    """

    check: str
    level: Level
    what: str
    why: str = ""
    command: str = ""
    then: str = ""
    repair: Repair | None = None

    @property
    def area(self) -> str:
        return self.check.partition(".")[0]

    @property
    def advice(self) -> str:
        return str(self.repair) if self.repair else self.command

    def to_json(self) -> dict[str, str | bool]:
        return {
            "check": self.check,
            "level": self.level.value,
            "what": self.what,
            "why": self.why,
            "command": self.advice,
            "then": self.then,
            "fixable": self.repair is not None,
        }
