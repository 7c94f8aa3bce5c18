"""Every command in README, CONTRIBUTING and docs/ is tried.

Blocks fenced as `sh` are read line by line. In a folder of its own for each page, with a tiny
random Gemma in the place of `google/gemma-3-1b-it`:

- `uq` commands run, quantizing with little calibration text, validating four short windows without
  measuring speeds, timing a short run, writing four tokens; a limit on the loss of a random model
  may be missed.
- `uq serve` waits for clients, `uq publish` needs the Hub, `demo:` the real model, `--scheduler`
  other machines, and `uq doctor --fix` a person: their arguments are parsed. They run in their own
  tests, and so do the lines of `curl`.
- Of scripts and modules of this repository it is checked that they exist.
- What installs or shows parts of the system (`SYSTEM`) is not run.

Blocks fenced as `python` are run. Links to files of the repository must lead somewhere.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from uq import api
from uq.cli import COMMANDS, build_parser, main
from uq.commands.completion import SHELLS
from uq.commands.examples import EXAMPLES
from uq.commands.quantize import default_folder, read_options
from uq.formats.xdna.build import build_xclbin, npu_kernel
from uq.formats.xdna.partition import AiePartition, Group, PdiEntry
from uq.quantize.pipeline import QuantizeOptions
from uq.validate import validate as stage

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
SYSTEM = {"pip", "dask", "sudo", "vulkaninfo", "lsmod", "ls", "curl", "lm_eval"}
PARSED = {"serve", "publish"}
ASKING = {"--fix", "--power-mode"}  # of uq doctor, which would change this machine
AWAY = {"--scheduler"}  # needs other machines
LIGHTER = {
    "quantize": ["--calibration-tokens", "64"],
    "validate": ["--chunks", "4", "--context", "32", "--no-speed"],
    "bench": ["--prompt", "32", "--generate", "8", "--repeats", "1"],
    "generate": ["--max-tokens", "4"],
    "chat": ["--max-tokens", "4"],
}
TEXT = "the time of the world and the city in which they were not one of the first " * 60
TRIED: set[tuple[str, ...]] = set()
BUNDLES = (
    "gemma-3-1b-it-int4",
    "gemma-3-1b-it-int8",
    "me/gemma-3-1b-it-int4",
    "mine",
)


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def commands(page: Path) -> Iterator[list[str]]:
    for block in blocks(page, "sh"):
        for line in block.splitlines():
            if words := shlex.split(line, comments=True):
                yield words


names = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


@pytest.fixture(scope="module")
def models(
    tiny_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """A checkpoint and its bundle, validated."""
    checkpoint, out = tiny_checkpoint(), tmp_path_factory.mktemp("bundles") / "tiny"
    assert main(["quantize", str(checkpoint), "-o", str(out), "--method", "rtn"]) == 0
    assert main(["validate", str(out), *LIGHTER["validate"]]) == 0
    return checkpoint, out


@pytest.fixture
def world(models: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which the reader of a page is."""
    checkpoint, bundle = models
    shutil.copytree(checkpoint, tmp_path / "google" / "gemma-3-1b-it")
    for name in BUNDLES:
        shutil.copytree(bundle, tmp_path / name)
    for text in ("mine.txt", "other.txt"):
        (tmp_path / text).write_text(TEXT)
    pdi = PdiEntry(b"pdi", (Group(1, (0x901,)),))
    partition = AiePartition(column_width=4, start_columns=(0,), pdis=(pdi,))
    xclbin = build_xclbin([npu_kernel(buffers=1)], partition)
    (tmp_path / "design.xclbin").write_bytes(xclbin.to_bytes())
    shutil.copy(ROOT / "tests/npu/accepted/passthrough_npu1.mlir", tmp_path / "design.mlir")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.StringIO("the time\n"))
    return tmp_path


def run(words: list[str], world: Path) -> None:
    """Try a command, unless an earlier page had the very same."""
    if tuple(words) in TRIED:
        return
    TRIED.add(tuple(words))
    arguments = [word.replace("\\n", "\n") for word in words[1:]]
    name = arguments[0]
    if name.startswith("--"):
        with pytest.raises(SystemExit) as end:
            main(arguments)
        assert end.value.code == 0
        return
    parsed = build_parser().parse_args(arguments)
    parsed_only = name in PARSED or (ASKING | AWAY) & set(arguments)
    if parsed_only or any("demo:" in word for word in arguments):
        return
    if name == "quantize" and not parsed.dry_run:  # the reader has not made it yet
        out = parsed.output or default_folder(parsed.model, read_options(parsed))
        shutil.rmtree(world / out, ignore_errors=True)
    code = main([*arguments, *LIGHTER.get(name, [])])
    assert code == 0 or (code == 1 and "--max-kld" in arguments), words


@names
def test_the_commands_of_a_page_work(page: Path, world: Path) -> None:
    for words in commands(page):
        match words[0]:
            case "uq":
                run(words, world)
            case "python":
                assert words[1] == "-m" and importlib.util.find_spec(words[2]), words
            case word if word.startswith("scripts/"):
                assert os.access(ROOT / word, os.X_OK), words
            case word if not word.startswith(".venv/bin/"):
                assert word in SYSTEM, words


@names
def test_the_python_of_a_page_runs(
    page: Path, world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With as little work as the commands have."""
    little: dict[str, Any] = {"speed": False, "max_chunks": 4, "context": 32}
    monkeypatch.setattr(stage, "ValidateOptions", partial(stage.ValidateOptions, **little))
    monkeypatch.setattr(api, "QuantizeOptions", partial(QuantizeOptions, calibration_tokens=64))
    for block in blocks(page, "python"):
        exec(compile(block, page.name, "exec"), {})


@names
def test_the_links_of_a_page_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+?)(?:#[^)]*)?\)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_the_docs_are_found() -> None:
    assert {"first-bundle.md", "serving.md", "hardware.md"} <= {page.name for page in PAGES}
    assert sum(words[0] == "uq" for page in PAGES for words in commands(page)) > 40


@pytest.mark.parametrize("name", COMMANDS)
def test_every_help_has_examples_that_parse(
    name: str, world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for bundle in ("BUNDLE", "OTHER"):
        shutil.copytree(world / BUNDLES[0], world / bundle)
    with pytest.raises(SystemExit):
        main([name, "--help"])
    shown = capsys.readouterr().out
    assert EXAMPLES[name]
    for line, _ in EXAMPLES[name]:
        assert line in shown
        words = shlex.split(line)
        redirected = [index for index, word in enumerate(words) if word in ("<", ">")]
        words = words[: min(redirected, default=len(words))]
        assert words[:2] == ["uq", name]
        assert isinstance(build_parser().parse_args(words[1:]), argparse.Namespace)


@pytest.mark.parametrize("shell", SHELLS)
def test_completion_knows_every_command(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert all(name in script for name in COMMANDS)
    assert "--calibration-tokens" in script or shell == "tcsh"


def test_bash_completes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What bash itself offers behind `uq q` and `uq serve --po`."""
    assert main(["completion", "bash"]) == 0
    (tmp_path / "uq").write_text(capsys.readouterr().out)
    script = """
        source ./uq
        COMP_WORDS=("$@") COMP_CWORD=$(($# - 1))
        _shtab_uq; echo "${COMPREPLY[@]}"
    """
    for words, offer in (("uq", "q"), "quantize"), (("uq", "serve", "--po"), "--port"):
        done = subprocess.run(
            ["bash", "-c", script, "bash", *words], cwd=tmp_path, capture_output=True, text=True
        )
        assert done.stdout.split() == [offer], done.stderr
