"""How often weights are fetched by a run that goes over the layers several times."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.hub_server.server import HubServer
from tests.test_hub_stream import REPO, content, weight_bytes
from uq.cli import main
from uq.formats.checkpoint import open_checkpoint, opening, read_ahead
from uq.quantize.pipeline import QuantizeOptions, quantize

Tiny = Callable[..., Path]
FEW = ["--calibration-tokens", "400", "--calibration-length", "100", "--group", "32"]


@pytest.fixture(autouse=True)
def little_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two layers are held in memory, as of a large model, and not 256 MiB."""
    monkeypatch.setattr(read_ahead, "BLOCK", 1 << 16)
    monkeypatch.setattr(opening, "BLOCK", 1 << 10)


def times_fetched(hub: HubServer, folder: Path, out: Path, *options: str) -> float:
    """Bytes that `uq quantize` fetches over those of the weights."""
    hub.store.add_folder(REPO, folder)
    assert main(["quantize", REPO, "-o", str(out), *FEW, *options]) == 0
    return weight_bytes(hub) / sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def test_weights_are_fetched_once_by_default(
    hub: HubServer,
    tiny_checkpoint: Tiny,
    tmp_path: Path,
    shipped_recipes: None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Gradients go over the layers forth and back, before they are quantized.

    What is looked at before the run begins, some of the embedding and of layer 0, comes twice.
    """
    folder, out = tiny_checkpoint(layers=12), tmp_path / "out"
    assert times_fetched(hub, folder, out) < 1.25
    assert "weights: fetched once; " in capsys.readouterr().err
    local = tmp_path / "local"
    assert main(["quantize", str(folder), "-o", str(local), *FEW]) == 0
    assert content(out) == content(local)
    assert "weights:" not in capsys.readouterr().err


@pytest.mark.parametrize(("room", "least", "most"), [(0.0, 2.5, 9.0), (0.6, 1.5, 2.5)])
def test_without_room_they_are_fetched_for_each_pass(
    hub: HubServer,
    tiny_checkpoint: Tiny,
    tmp_path: Path,
    shipped_recipes: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    room: float,
    least: float,
    most: float,
) -> None:
    folder = tiny_checkpoint(layers=8)
    free = int(room * sum(path.stat().st_size for path in folder.glob("*.safetensors")))
    monkeypatch.setattr("uq.quantize.job.Job._room", lambda job, writer: 0)
    monkeypatch.setattr("uq.formats.checkpoint.checkpoint.free_bytes", lambda path: free)
    assert least < times_fetched(hub, folder, tmp_path / "out") < most
    said = capsys.readouterr().err
    assert "weights: fetched for each pass over the layers but for what is kept; " in said
    assert "more room there, or --keep, they are fetched once" in said


def test_one_pass_keeps_nothing_on_the_disk(
    hub: HubServer,
    tiny_checkpoint: Tiny,
    tmp_path: Path,
    shipped_recipes: None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    assert times_fetched(hub, tiny_checkpoint(layers=8), out, "--no-curvature") < 1.5
    assert "weights:" not in capsys.readouterr().err


def test_two_runs_of_one_checkpoint_fetch_it_once(
    hub: HubServer, tiny_checkpoint: Tiny, tmp_path: Path, shipped_recipes: None
) -> None:
    folder = tiny_checkpoint(layers=8)
    hub.store.add_folder(REPO, folder)
    checkpoint = open_checkpoint(REPO, stream=True)
    options = QuantizeOptions(group=32, calibration_tokens=200, calibration_length=100)
    first = quantize(checkpoint, tmp_path / "first", options)
    fetched = weight_bytes(hub)
    assert content(quantize(checkpoint, tmp_path / "second", options)) == content(first)
    assert weight_bytes(hub) < 1.01 * fetched


def test_a_dry_run_counts_them(
    hub: HubServer, tiny_checkpoint: Tiny, shipped_recipes: None, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tiny_checkpoint(layers=8)
    hub.store.add_folder(REPO, folder)
    spilled = []
    for model in (REPO, str(folder)):
        assert main(["quantize", model, *FEW, "--dry-run", "--json"]) == 0
        spilled.append(json.loads(capsys.readouterr().out)["spilled"])
    weights = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert 0.95 * weights < spilled[0] - spilled[1] <= weights


@pytest.mark.parametrize("room", [True, False])
def test_a_reference_is_fetched_once_where_there_is_room(
    hub: HubServer,
    tiny_checkpoint: Tiny,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    room: bool,
) -> None:
    """Validation runs it, and compares its weights with the bundle's."""
    folder, out = tiny_checkpoint(layers=8), tmp_path / "out"
    hub.store.add_folder(REPO, folder)
    assert main(["quantize", str(folder), "-o", str(out), "--method", "rtn"]) == 0
    if not room:
        monkeypatch.setattr("uq.formats.checkpoint.checkpoint.free_bytes", lambda path: 0)
    monkeypatch.setattr("uq.kernels.reference.resident_parameters", lambda config: 1 << 60)
    options = ["--no-speed", "--chunks", "1", "--context", "64", "--reference-device", "reference"]
    assert main(["validate", str(out), "--reference", REPO, *options]) == 0
    weights = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert (weight_bytes(hub) < 1.05 * weights) == room
