"""Memory: what a run is made to fit into, and what it then takes."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.shapes import shape_config
from uq.commands.arguments import nbytes
from uq.errors import DeviceError, UsageError
from uq.formats.bundle import open_bundle
from uq.formats.checkpoint import open_checkpoint
from uq.quantize.estimate import estimate
from uq.quantize.memory import Footprint, footprint, spills
from uq.quantize.pipeline import QuantizeOptions, plan_of, quantize

Tiny = Callable[..., Path]
OPTIONS = QuantizeOptions(method="gptq", group=32, calibration_tokens=65536)


def limit(found: Footprint) -> int:
    """Room for all but a part of the activations."""
    return found.base + found.activations // 2


@pytest.fixture
def no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("uq.quantize.pipeline.spills", lambda *_: True)


def test_spilling_changes_no_byte_and_leaves_no_file(
    tiny_checkpoint: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tiny_checkpoint()
    options = QuantizeOptions(method="gptq", group=32, calibration_tokens=600)
    plain = open_bundle(quantize(open_checkpoint(source), tmp_path / "plain", options))
    monkeypatch.setattr("uq.quantize.pipeline.spills", lambda *_: True)
    spilled = open_bundle(quantize(open_checkpoint(source), tmp_path / "spilled", options))
    assert spilled.sha256 == plain.sha256
    names = [sorted(p.name for p in (tmp_path / n).iterdir()) for n in ("plain", "spilled")]
    assert names[0] == names[1]


def test_a_disk_without_room_for_the_activations_is_refused(
    tiny_checkpoint: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_memory: None
) -> None:
    options = QuantizeOptions(method="gptq", group=32, calibration_tokens=1 << 40)
    with pytest.raises(DeviceError, match="bytes needed"):
        quantize(open_checkpoint(tiny_checkpoint()), tmp_path / "b", options)
    assert not list(tmp_path.glob("b*"))


def test_a_disk_that_fills_up_while_spilling_is_one_line(
    tiny_checkpoint: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_memory: None
) -> None:
    full = Path("/dev/full")
    monkeypatch.setattr("tempfile.TemporaryFile", lambda dir: full.open("r+b"))
    options = QuantizeOptions(method="gptq", group=32, calibration_tokens=600)
    with pytest.raises(DeviceError, match="No space left"):
        quantize(open_checkpoint(tiny_checkpoint()), tmp_path / "b", options)


def test_a_limit_decides_where_activations_wait() -> None:
    config = shape_config("27b")
    found = footprint(config, plan_of(config, OPTIONS), OPTIONS.calibration_tokens, 2)
    assert not spills(found, found.resident)
    assert spills(found, limit(found))
    with pytest.raises(UsageError, match="--max-memory 1.0 GiB: this run takes about .* GiB"):
        spills(found, 1 << 30)


def test_memory_does_not_depend_on_the_number_of_layers() -> None:
    two, all_layers = (shape_config("27b", layers) for layers in (2, 62))
    for options in (OPTIONS, QuantizeOptions(method="rtn")):
        bases = [footprint(c, plan_of(c, options), 65536, 2).base for c in (two, all_layers)]
        assert bases[1] == pytest.approx(bases[0], rel=0.01)


def test_a_limit_that_nothing_fits_is_refused_before_any_work(
    tiny_checkpoint: Tiny, tmp_path: Path
) -> None:
    options = QuantizeOptions(method="gptq", group=32, max_memory=1 << 20)
    for work in (estimate, lambda c, o: quantize(c, tmp_path / "b", o)):
        with pytest.raises(UsageError, match="--max-memory 1.0 MiB: .* --method rtn"):
            work(open_checkpoint(tiny_checkpoint()), options)
    assert not list(tmp_path.iterdir())


def test_an_estimate_shows_what_waits_on_the_disk(
    tiny_checkpoint: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("uq.quantize.estimate.spills", lambda *_: True)
    found = estimate(open_checkpoint(tiny_checkpoint()), QuantizeOptions(method="gptq", group=32))
    assert found.spilled > 0 and "during calibration" in str(found)


@pytest.mark.parametrize(
    ("text", "value"), [("10G", 10 << 30), ("1.5g", 3 << 29), ("512MiB", 1 << 29)]
)
def test_sizes_are_read(text: str, value: int) -> None:
    assert nbytes(text) == value


@pytest.mark.parametrize("text", ["10", "G", "-1G", "1T", "0G", "\u0661G"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="such as 10G"):
        nbytes(text)
