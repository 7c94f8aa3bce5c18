"""Ctrl-C that must not get lost.

The exception of a signal that comes while C code calls Python (numba, as it loads kernels) is
printed there and swallowed. So who handles the signal sets an event, too, and the next step of a
stage ends it.
"""

from __future__ import annotations

from threading import Event
from types import FrameType
from typing import NoReturn

_came = Event()


def interrupt(_number: int, _frame: FrameType | None) -> NoReturn:
    """A handler of signals."""
    _came.set()
    raise KeyboardInterrupt


def end_if_interrupted() -> None:
    """Raises KeyboardInterrupt: a signal came, wherever its exception went."""
    if _came.is_set():
        raise KeyboardInterrupt


def forget_interrupts() -> None:
    _came.clear()
