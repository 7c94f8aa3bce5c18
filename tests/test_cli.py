"""The command line: parsing, exit codes, the one line that a failure leaves."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import shlex
import signal
import subprocess
import sys
import threading
from argparse import ArgumentTypeError, Namespace
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from uq import __version__, cli
from uq.cli import main
from uq.commands import doctor
from uq.commands.arguments import names, real, whole
from uq.errors import ThresholdMissed, UqError, UsageError
from uq.progress import BarProgress, LineProgress

UQ = [sys.executable, "-m", "uq"]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], int]], None]:
    """Lets `uq doctor` do something else."""

    def replace(action: Callable[[], int]) -> None:
        def run(args: Namespace) -> int:
            return action()

        monkeypatch.setattr(doctor, "run", run)

    return replace


def raising(error: BaseException) -> Callable[[], int]:
    def action() -> int:
        raise error

    return action


@pytest.mark.parametrize(
    ("error", "line", "code"),
    [
        (UqError("a: b"), "a: b", 1),
        (UsageError("wrong"), "wrong", 2),
        (ThresholdMissed("kld 2"), "kld 2", 1),
        (UqError("two\n lines"), "two lines", 1),
        (KeyboardInterrupt(), "interrupted", 130),
        (MemoryError(), "out of memory; close other programs", 1),
        (FileNotFoundError(errno.ENOENT, "No such file", "x"), "No such file: x", 1),
        (
            OSError(errno.ENOSPC, "full", "x"),
            "no space left on the disk: x; free some and run it again",
            1,
        ),
        (
            ModuleNotFoundError("no jinja2", name="jinja2"),
            "package jinja2 is not installed; run: pip install jinja2",
            1,
        ),
        (
            KeyError("k"),
            "internal error: KeyError: 'k'; run with UQ_DEBUG=1 for the traceback and report it",
            70,
        ),
    ],
)
def test_a_failure_is_one_line_and_an_exit_code(
    error: BaseException,
    line: str,
    code: int,
    command: Callable[[Callable[[], int]], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    command(raising(error))
    assert main(["doctor"]) == code
    assert capsys.readouterr() == ("", f"uq: {line}\n")


def test_debug_adds_the_traceback(
    command: Callable[[Callable[[], int]], None],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("UQ_DEBUG", "1")
    command(raising(UqError("broken")))
    assert main(["doctor"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("Traceback") and err.endswith("\nuq: broken\n")


@pytest.fixture
def usual() -> Iterator[None]:
    """Nothing is ignored, though a shell lets what it starts with `&` ignore Ctrl-C."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, signal.SIG_DFL) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("usual")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_is_an_interrupt(
    number: signal.Signals,
    command: Callable[[Callable[[], int]], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    def end() -> int:
        os.kill(os.getpid(), number)
        return 0

    before = signal.getsignal(number)
    command(end)
    assert main(["doctor"]) == 130
    assert capsys.readouterr().err == "uq: interrupted\n"
    assert signal.getsignal(number) == before


def test_a_signal_that_is_ignored_stays_so(command: Callable[[Callable[[], int]], None]) -> None:
    """As of `nohup`."""

    def hang_up() -> int:
        os.kill(os.getpid(), signal.SIGHUP)
        return 0

    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    command(hang_up)
    assert main(["doctor"]) == 0
    signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("usual")
@pytest.mark.parametrize("kind", [BarProgress, LineProgress])
def test_an_interrupt_that_was_swallowed_ends_the_next_step(
    kind: type[BarProgress] | type[LineProgress], command: Callable[[Callable[[], int]], None]
) -> None:
    """C code that calls Python prints the exception and goes on."""
    progress = kind(io.StringIO())

    def go_on() -> int:
        with contextlib.suppress(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        progress.start(1, "quantize")
        progress.advance("layer 0")
        return 0

    command(go_on)
    assert main(["doctor"]) == 130
    progress.advance("the next command knows nothing of it")


def test_main_works_outside_the_main_thread(
    command: Callable[[Callable[[], int]], None],
) -> None:
    codes: list[int] = []
    command(lambda: 3)
    thread = threading.Thread(target=lambda: codes.append(main(["doctor"])))
    thread.start()
    thread.join()
    assert codes == [3]


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        ([], "COMMAND; see uq --help"),
        (["fly"], "invalid choice: 'fly'"),
        (["quantize"], "MODEL; see uq quantize --help"),
        (["quantize", "m", "--bits", "3"], "invalid choice: 3 (choose from 4, 5, 6, 8)"),
        (["quantize", "m", "--group", "80"], "invalid choice: 80 (choose from 32, 64, 128)"),
        (["quantize", "m", "--method", "awq"], "'auto', 'rtn', 'gptq'"),
        (["quantize", "m", "--recipe", "int3"], "int4-small"),
        (["quantize", "m", "--bits", "4", "--recipe", "int8"], "not allowed with"),
        (["quantize", "m", "--resume", "--restart"], "not allowed with"),
        (["quantize", "m", "--target", "gpu"], "'gpu' is not one of igpu, npu"),
        (["quantize", "m", "--threads", "0"], "expected a whole number, 1 or more, not '0'"),
        (["quantize", "m", "--calibration-tokens", "many"], "not 'many'"),
        (["generate", "b"], "-p/--prompt"),
        (["generate", "b", "-p", "x", "--temperature", "-1"], "a number 0 or more, not '-1'"),
        (["generate", "b", "-p", "x", "--temperature", "nan"], "not 'nan'"),
        (["generate", "b", "-p", "x", "--top-p", "0"], "a number above 0, at most 1, not '0'"),
        (["generate", "b", "-p", "x", "--top-p", "1.5"], "not '1.5'"),
        (["generate", "b", "-p", "x", "--max-tokens", "1.5"], "not '1.5'"),
        (["generate", "b", "-p", "x", "--device", "gpu"], "npu, npu-emulator, cpu, reference)"),
        (["validate", "c"], "c is not there; make a bundle of a model"),
        (["validate", "b", "--context", "1"], "2 or more, not '1'"),
        (["validate", "b", "--max-kld", "inf"], "not 'inf'"),
        (["inspect"], "MODEL|BUNDLE"),
        (["doctor", "--jso"], "unrecognized arguments: --jso"),
    ],
)
def test_wrong_usage_is_refused_with_the_allowed_values(
    argv: list[str],
    part: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "manifest.json").touch()
    monkeypatch.chdir(tmp_path)
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert not out
    assert err.startswith("uq: ") and err.count("\n") == 1
    assert part in err


@pytest.mark.parametrize("argv", [["--help"], *([name, "--help"] for name in cli.COMMANDS)])
def test_help_names_the_command(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main(argv)
    assert exit.value.code == 0
    assert f"usage: {' '.join(['uq', *argv[:-1]])}" in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main(["--version"])
    assert exit.value.code == 0
    assert capsys.readouterr().out == f"uq {__version__}\n"


@pytest.mark.parametrize("argv", ["['--help']", "['quantize']", "['quantize', 'm', '--bits', '3']"])
def test_help_and_usage_errors_import_nothing_heavy(argv: str) -> None:
    code = f"""
import sys
from uq.cli import main
try:
    main({argv})
except SystemExit:
    pass
heavy = {{"numpy", "numba", "tqdm", "psutil", "jinja2", "tokenizers"}} & set(sys.modules)
sys.exit(f"imported {{heavy}}" if heavy else 0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_reader_that_leaves_is_no_error() -> None:
    """As in `uq doctor --json | head -c 1`."""
    with subprocess.Popen(
        [*UQ, "doctor", "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_streams_that_are_closed_are_not_missed(closed: str) -> None:
    line = shlex.join([*UQ, "inspect", "/nowhere"])
    done = subprocess.run(["sh", "-c", f"{line} {closed}"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "" or done.stderr.startswith("uq: /nowhere: no such folder")


def test_a_full_stdout_is_one_line() -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run([*UQ, "doctor"], stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1
    assert done.stderr == "uq: no space left on the disk; free some and run it again\n"


@pytest.mark.parametrize("text", ["0", "7", "x", "1.5", "", "9" * 5000])
def test_whole_refuses_what_is_outside(text: str) -> None:
    with pytest.raises(ArgumentTypeError, match=r"expected a whole number, 1\.\.6, not"):
        whole(1, 6)(text)


def test_numbers_inside_are_read() -> None:
    assert (whole(1)("12"), whole(0, 3)("3")) == (12, 3)
    assert (real(0)("0"), real(0, 1, above=True)("1")) == (0.0, 1.0)
    assert names(("a", "b"))("b, a,b") == ("b", "a")
