"""`uq serve` as a command: how it starts and stops, and what it refuses."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from numpy.typing import NDArray

from tests.serve_site import KEY, site
from uq.cli import main
from uq.formats.bundle import Bundle, open_bundle
from uq.kernels.backends import open_batch
from uq.kernels.session import BatchSession, Piece
from uq.serve.server import ServeOptions


@pytest.fixture(scope="module")
def bundle(
    tiny_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Bundle:
    out = tmp_path_factory.mktemp("bundles") / "tiny"
    assert main(["quantize", str(tiny_checkpoint()), "-o", str(out), "--method", "rtn"]) == 0
    return open_bundle(out)


def test_one_thread_opens_the_model_and_runs_it(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two would have a team of OpenMP threads each, more than there are cores."""
    opened = []

    def opening(*args: Any, **options: Any) -> BatchSession:
        opened.append(threading.current_thread())
        return open_batch(*args, **options)

    monkeypatch.setattr("uq.serve.server.open_batch", opening)
    with site(bundle) as fresh:
        before, ran = fresh.server.session.extend, []

        def extend(pieces: Sequence[Piece]) -> NDArray[np.float32]:
            ran.append(threading.current_thread())
            return before(pieces)

        monkeypatch.setattr(fresh.server.session, "extend", extend)
        assert fresh.send("POST", "/v1/completions", {"prompt": "x", "max_tokens": 2})[0] == 200
    assert set(ran) == set(opened) != {threading.main_thread()}


def test_the_command_serves_until_it_is_told_to_stop(bundle: Bundle) -> None:
    argv = [sys.executable, "-m", "uq", "serve", str(bundle.path), "--port", "0", "--parallel", "2"]
    environment = os.environ | {"UQ_API_KEY": KEY}
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(3)]
        assert lines[0].startswith("tiny on ") and lines[1].startswith("KV caches: ")
        url = lines[2].split()[-1]
        assert openai.OpenAI(base_url=url, api_key=KEY).models.list().data[0].id == "tiny"
        process.send_signal(signal.SIGTERM)
    assert process.returncode == 0


def test_a_second_signal_ends_answers_in_work(bundle: Bundle) -> None:
    argv = [sys.executable, "-m", "uq", "serve", str(bundle.path), "--port", "0"]
    argv += ["--context", "4096", "--parallel", "1"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(argv, **pipes) as process:  # type: ignore[call-overload]
        url = [process.stdout.readline() for _ in range(3)][2].split()[-1]
        client = openai.OpenAI(base_url=url, api_key=KEY, max_retries=0)
        answers = [
            client.completions.create(
                model="tiny", prompt=[2, 9], max_tokens=4000, temperature=0, stream=True
            )
            for _ in range(2)
        ]
        next(iter(answers[0]))
        process.send_signal(signal.SIGINT)
        assert "2 requests have 5 s to end" in process.stderr.readline()
        process.send_signal(signal.SIGINT)
        for answer in answers:
            with pytest.raises(openai.APIError, match="the server was stopped"):
                list(answer)
        assert process.stderr.read() == "stopped\n"
    assert process.returncode == 0


def test_an_address_in_use_is_one_line(bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", str(bundle.path), "--port", str(port)]) == 1
    line = f"uq: --host 127.0.0.1 --port {port}: Address already in use; choose another\n"
    assert capsys.readouterr().err.endswith(line)


@pytest.mark.parametrize("content", [None, b"", b"\xff", b"one\ntwo\n"])
def test_a_key_file_that_holds_no_key_is_refused(
    bundle: Bundle, tmp_path: Path, content: bytes | None, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        (tmp_path / "key").write_bytes(content)
    assert main(["serve", str(bundle.path), "--api-key-file", str(tmp_path / "key")]) == 2
    assert capsys.readouterr().err.startswith(f"uq: --api-key-file {tmp_path / 'key'}: ")


@pytest.mark.parametrize(
    ("host", "local"), [("127.0.0.1", True), ("::1", True), ("0.0.0.0", False), ("x.org", False)]
)
def test_whether_others_can_reach_it(host: str, local: bool) -> None:
    assert ServeOptions(host=host).local is local


@pytest.mark.parametrize("command", ["serve", "chat"])
def test_a_template_that_is_broken_is_refused_at_the_start(
    bundle: Bundle, tmp_path: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "t.jinja").write_text("{% if %}")
    assert main([command, str(bundle.path), "--template", str(tmp_path / "t.jinja")]) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("uq: chat template: TemplateSy")
