"""Progress: lines into a log, a bar on a terminal."""

from __future__ import annotations

import contextlib
import io
import os
import pty
import termios

import pytest

from uq.progress import BarProgress, LineProgress, Progress, terminal_progress


def run_stage(progress: Progress) -> None:
    progress.start(3, "quantize", done=1)
    for layer in (1, 2):
        progress.work(f"layer {layer} mlp.up_proj")
        progress.advance(f"layer {layer}", error=0.0123456)
    progress.note("a remark")
    progress.close()


def drained(terminal: int) -> str:
    """All that was written to a pseudo terminal whose other side is closed."""
    pieces = []
    with contextlib.suppress(OSError):  # Linux ends the stream with EIO
        while piece := os.read(terminal, 1 << 16):
            pieces.append(piece)
    os.close(terminal)
    return b"".join(pieces).decode()


def test_a_log_gets_one_line_per_step() -> None:
    log = io.StringIO()
    run_stage(terminal_progress(log))
    first, second, remark = log.getvalue().splitlines()
    assert first.startswith("quantize 2/3 layer 1, error 0.01235, ")
    assert second.startswith("quantize 3/3 layer 2, ")
    assert second.endswith(" GiB, 0 s left")
    assert remark == "a remark"


def test_the_time_left_counts_the_steps_of_this_run(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([100.0, 110.0])
    monkeypatch.setattr("time.monotonic", lambda: next(times))
    log = io.StringIO()
    progress = LineProgress(log)
    progress.start(10, "quantize", done=5)
    progress.advance("layer 5")
    assert log.getvalue().endswith(", 40 s left\n")


def test_a_terminal_gets_a_bar() -> None:
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 120))
    with open(theirs, "w", encoding="utf-8") as terminal:
        progress = terminal_progress(terminal)
        assert isinstance(progress, BarProgress)
        run_stage(progress)
    shown = drained(ours)
    assert "3/3" in shown and "layer 2, error 0.01235" in shown
    assert "a remark\r\n" in shown


def test_a_terminal_without_a_size_gets_lines() -> None:
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (0, 0))
    with open(theirs, "w", encoding="utf-8") as terminal:
        assert isinstance(terminal_progress(terminal), LineProgress)
    os.close(ours)


def test_closing_twice_or_unstarted_is_harmless() -> None:
    progress = BarProgress(io.StringIO())
    progress.close()
    progress.advance("layer 0")
    progress.note("still here")
    run_stage(progress)
    progress.close()
