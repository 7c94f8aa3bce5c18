"""`import uq`: light, typed, and the same results as the commands."""

from __future__ import annotations

import importlib
import inspect
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import uq
from uq.cli import main
from uq.errors import UsageError
from uq.validate.report import Report

TEXT = "the time of the world and the city in which they were not one of the first " * 30


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Callable[..., Path]) -> Path:
    return tiny_checkpoint()


@pytest.fixture(scope="module")
def bundle(model: Path, tmp_path_factory: pytest.TempPathFactory) -> uq.Bundle:
    out = tmp_path_factory.mktemp("bundles") / "tiny"
    return uq.quantize(model, out, uq.QuantizeOptions(method="rtn"))


def test_quantize_returns_the_bundle_of_the_command(
    model: Path, bundle: uq.Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["quantize", str(model), "-o", str(tmp_path / "b"), "--method", "rtn", "--json"]
    assert main(command) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["bytes"] == bundle.nbytes
    assert facts["bits_per_weight"] == bundle.bits_per_weight
    assert facts["sha256"] == bundle.sha256


def test_quantize_takes_an_opened_checkpoint(
    model: Path, bundle: uq.Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    checkpoint = uq.open_checkpoint(model)
    made = uq.quantize(checkpoint, options=uq.QuantizeOptions(method="rtn"))
    assert made.path.name == f"{model.name}-int4"
    assert made.quant("model.layers.0.mlp.up_proj.weight").shape == (256, 128)


def test_validate_returns_the_report_of_the_command(
    bundle: uq.Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text").write_text(TEXT)
    options = uq.ValidateOptions(
        text=tmp_path / "text", context=32, max_chunks=4, speed=False, device="cpu"
    )
    report = uq.validate(bundle, options=options)
    assert isinstance(report, Report)
    command = ["validate", str(bundle.path), "--text", str(tmp_path / "text"), "--context", "32"]
    command += ["--chunks", "4", "--device", "cpu", "--text-format", "plain"]
    assert main([*command, "--no-speed", "--no-save", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["kld"] == report.to_json()["kld"]
    assert printed["bundle"] == report.to_json()["bundle"]


def test_export_writes_what_the_command_writes(
    bundle: uq.Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    made = uq.export(bundle, options=uq.ExportOptions("gguf"))
    assert main(["export", str(bundle.path), "--format", "gguf", "-o", "command.gguf"]) == 0
    assert made.path.name == f"{bundle.name}.gguf" and made.rounded == ()
    assert made.path.read_bytes() == Path("command.gguf").read_bytes()


def test_export_refuses_what_it_does_not_know(bundle: uq.Bundle) -> None:
    for options in (uq.ExportOptions("onnx"), uq.ExportOptions(dtype="int3")):
        with pytest.raises(uq.UqError, match="is not known; use "):
            uq.export(bundle, options=options)


def test_a_bundle_is_opened_by_its_path(bundle: uq.Bundle) -> None:
    assert uq.Bundle.open(str(bundle.path)).sha256 == bundle.sha256
    with pytest.raises(uq.UqError, match=r"has no manifest\.json"):
        uq.Bundle.open(bundle.path.parent)


def test_the_packages_are_still_packages() -> None:
    package: Any = importlib.import_module("uq.quantize")
    importlib.import_module("uq.quantize.plan")
    assert package.plan.RECIPES and package is uq.quantize
    assert list(inspect.signature(uq.quantize).parameters)[:3] == ["model", "output", "options"]


def test_every_promised_name_is_there() -> None:
    assert set(uq.__all__) <= set(dir(uq))
    for name in uq.__all__:
        assert inspect.getdoc(getattr(uq, name)), name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        uq.nothing  # type: ignore[attr-defined]  # noqa: B018


def test_importing_uq_loads_nothing_heavy() -> None:
    code = "import sys, uq; sys.exit(str({'numpy', 'numba', 'psutil', 'tqdm'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr.strip() == "set()"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: uq.QuantizeOptions(calibration_length=1), "in sequences of 2 or more"),
        (lambda: uq.QuantizeOptions(calibration_tokens=0), "use 1 or more"),
        (lambda: uq.QuantizeOptions(calibration_seed=-1), "calibration_seed -1; use 0 or more"),
        (lambda: uq.QuantizeOptions(threads=0), "threads 0; use 1 or more"),
        (lambda: uq.QuantizeOptions(resume="x"), "resume 'x' is not known"),
        (lambda: uq.ValidateOptions(activations="int7"), "activations 'int7'"),
        (lambda: uq.ValidateOptions(kv="x"), "kv 'x'"),
        (lambda: uq.ValidateOptions(max_kld=float("nan")), "max_kld is no number"),
    ],
)
def test_options_that_are_none_are_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make()
