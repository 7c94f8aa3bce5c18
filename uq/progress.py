"""How a long stage tells the user where it is: a bar on a terminal, one line per step elsewhere."""

from __future__ import annotations

import os
import sys
import time
from typing import Protocol, TextIO

import psutil
from tqdm import tqdm

from uq.interrupt import end_if_interrupted


class Progress(Protocol):
    """What a stage reports. Parts follow each other: `start`, `advance` once per step, `close`."""

    def start(self, total: int, label: str, *, done: int = 0) -> None:
        """Begin a part of `total` steps, `done` of which an earlier run has finished."""
        ...

    def work(self, what: str) -> None:
        """Name what is in work within the current step, e.g. `layer 3 mlp.down_proj`."""
        ...

    def advance(self, step: str, **figures: float) -> None:
        """Finish one step, e.g. `advance("layer 3", error=0.0121)`."""
        ...

    def note(self, text: str) -> None:
        """Say one line that stays on the screen."""
        ...

    def close(self) -> None:
        """End the current part; harmless when there is none."""
        ...


class SilentProgress:
    """Says nothing: the default of a stage that is called as a library."""

    def start(self, total: int, label: str, *, done: int = 0) -> None: ...
    def work(self, what: str) -> None: ...
    def advance(self, step: str, **figures: float) -> None: ...
    def note(self, text: str) -> None: ...
    def close(self) -> None: ...


class BarProgress:
    """A tqdm bar with the step, its figures, the time left and the memory in use."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._bar: tqdm | None = None
        self._figures = ""

    def start(self, total: int, label: str, *, done: int = 0) -> None:
        self.close()
        form = "{desc} {bar} {n_fmt}/{total_fmt} [{elapsed}<{remaining}]{postfix}"
        self._figures = ""
        self._bar = tqdm(
            total=total,
            desc=label,
            initial=done,
            file=self._stream,
            bar_format=form,
            dynamic_ncols=True,
        )

    def work(self, what: str) -> None:
        end_if_interrupted()
        if self._bar is not None:
            self._bar.set_postfix_str(_join(what, self._figures, _memory()))

    def advance(self, step: str, **figures: float) -> None:
        end_if_interrupted()
        if self._bar is not None:
            self._figures = _figures(figures)
            self._bar.set_postfix_str(_join(step, self._figures, _memory()), refresh=False)
            self._bar.update(1)

    def note(self, text: str) -> None:
        tqdm.write(text, file=self._stream)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


class LineProgress:
    """One line per step, for logs and pipes."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._label, self._total, self._count, self._skipped = "", 0, 0, 0
        self._began = 0.0

    def start(self, total: int, label: str, *, done: int = 0) -> None:
        self._label, self._total, self._count, self._skipped = label, total, done, done
        self._began = time.monotonic()

    def work(self, what: str) -> None:
        """Nothing: a log gets finished steps only."""
        end_if_interrupted()

    def advance(self, step: str, **figures: float) -> None:
        end_if_interrupted()
        self._count += 1
        elapsed = time.monotonic() - self._began
        left = elapsed / (self._count - self._skipped) * (self._total - self._count)
        head = f"{self._label} {self._count}/{self._total} {step}"
        self.note(_join(head, _figures(figures), _memory(), f"{left:.0f} s left"))

    def note(self, text: str) -> None:
        print(text, file=self._stream, flush=True)

    def close(self) -> None: ...


def terminal_progress(stream: TextIO | None = None) -> Progress:
    """A bar when `stream` (default: stderr) is a terminal, lines when it is not."""
    stream = sys.stderr if stream is None else stream
    return BarProgress(stream) if stream.isatty() and _has_width(stream) else LineProgress(stream)


def _has_width(stream: TextIO) -> bool:
    """Some terminals, as of programs that drive others, have no size."""
    try:
        return os.get_terminal_size(stream.fileno()).columns > 0
    except OSError:
        return True


def _figures(figures: dict[str, float]) -> str:
    return _join(*(f"{name} {value:.4g}" for name, value in figures.items()))


def _memory() -> str:
    return f"{psutil.Process().memory_info().rss / 2**30:.1f} GiB"


def _join(*parts: str) -> str:
    return ", ".join(part for part in parts if part)
