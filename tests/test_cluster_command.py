"""What `uq quantize --scheduler` says where there is nobody to do the work."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from distributed import LocalCluster

from uq.cli import main
from uq.cluster import link


@pytest.fixture
def model(tiny_checkpoint: Callable[..., Path]) -> Path:
    return tiny_checkpoint(layers=1)


def test_nobody_there_is_one_line(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link, "PATIENCE", 0.3)
    words = ["quantize", str(model), "-o", str(tmp_path / "b"), "--method", "rtn", "--scheduler"]
    assert main([*words, "tcp://127.0.0.1:9"]) == 1
    assert "tcp://127.0.0.1:9: no scheduler answers there" in capsys.readouterr().err
    with LocalCluster(n_workers=0, dashboard_address="127.0.0.1:0", protocol="tcp") as empty:
        assert main([*words, empty.scheduler_address]) == 1
    assert "the scheduler has no workers; start one" in capsys.readouterr().err


def test_without_the_extra_one_line_says_how_to_install_it(
    model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("cluster", "link", "members", "relay", "worker"):
        monkeypatch.delitem(sys.modules, f"uq.cluster.{name}")
    monkeypatch.setitem(sys.modules, "distributed", None)
    assert main(["quantize", str(model), "--scheduler", "tcp://127.0.0.1:9"]) == 1
    assert "pip install 'unicorn-quant[cluster]'" in capsys.readouterr().err
