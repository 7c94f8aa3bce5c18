"""Memory: what a run is made to fit into, and what it then takes."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from benchmarks.shapes import shape_config
from uq.commands.arguments import nbytes
from uq.errors import DeviceError, UsageError
from uq.formats.bundle import Bundle, open_bundle
from uq.formats.checkpoint import open_checkpoint
from uq.formats.config import GemmaConfig
from uq.quantize.estimate import estimate
from uq.quantize.job import plan_of
from uq.quantize.memory import LADDER, Fitted, Load, fit, footprint
from uq.quantize.pipeline import QuantizeOptions, quantize
from uq.quantize.plan import Plan, WorkSizes

Tiny = Callable[..., Path]
OPTIONS = QuantizeOptions(method="gptq", group=32, calibration_tokens=65536)


FEW = QuantizeOptions(method="gptq", group=32, calibration_tokens=600, calibration_length=128)
LOAD = Load(tokens=65536, length=1024, threads=2)


def fitted(limit: int, options: QuantizeOptions = OPTIONS, shape: str = "27b") -> Fitted:
    config = shape_config(shape)
    return fit(config, plan_of(config, options), LOAD, limit)


@pytest.fixture
def small_program(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the command is: without the libraries that tests load."""
    monkeypatch.setattr("uq.quantize.memory._program_bytes", lambda config, load: 180 << 20)


def always_spilled(config: GemmaConfig, plan: Plan, load: Load, limit: int | None) -> Fitted:
    return Fitted(plan, footprint(config, plan, load), spills=True)


@pytest.fixture
def no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("uq.quantize.job.fit", always_spilled)


def made(source: Path, out: Path, options: QuantizeOptions) -> Bundle:
    return open_bundle(quantize(open_checkpoint(source), out, options))


@pytest.fixture(scope="module")
def source(tiny_checkpoint: Tiny) -> Path:
    return tiny_checkpoint(layers=1)


@pytest.fixture(scope="module")
def usual(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return made(source, tmp_path_factory.mktemp("usual") / "b", FEW)


def test_spilling_changes_no_byte_and_leaves_no_file(
    source: Path, usual: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("uq.quantize.job.fit", always_spilled)
    spilled = made(source, tmp_path / "b", FEW)
    assert spilled.sha256 == usual.sha256
    listed = {*spilled.manifest.files, "manifest.json", "manifest.sha256"}
    assert {path.name for path in (tmp_path / "b").iterdir()} == listed


def test_chosen_sizes_are_used_and_recorded(
    source: Path, usual: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other batches, blocks of rows and types: other codes, but as good ones."""
    small = WorkSizes(batch_tokens=256, row_numbers=1 << 12, double_width=0)
    monkeypatch.setattr("uq.quantize.memory.LADDER", (small,))
    other = made(source, tmp_path / "b", replace(FEW, max_memory=1 << 40))
    recorded = other.manifest.options["gptq"]
    assert isinstance(recorded, dict) and recorded["work"] == asdict(small)
    assert other.sha256 != usual.sha256
    for name, record in usual.manifest.tensors.items():
        error = other.manifest.tensors[name].relative_error
        assert error == pytest.approx(record.relative_error, rel=0.02)


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


def test_a_limit_chooses_more_and_more_savings(small_program: None) -> None:
    """First what changes no byte, then ever smaller sizes; each choice fits its limit."""
    whole = fitted(1 << 40, shape="4b")
    assert not whole.spills and whole.plan.gptq.work == WorkSizes()
    limit, found = whole.memory.resident, [whole]
    while limit > 0:
        limit = found[-1].resident - 1
        try:
            found.append(fitted(limit, shape="4b"))
        except UsageError:
            break
        assert found[-1].spills and found[-1].resident <= limit
    assert [each.plan.gptq.work for each in found] == [LADDER[0], *LADDER]
    assert found[-1].resident < 0.7 * found[1].resident


def test_what_is_free_does_not_choose_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """They would change bytes from machine to machine."""
    config = shape_config("27b")
    monkeypatch.setattr("uq.quantize.memory.SHARE", 0.0)
    found = fit(config, plan_of(config, OPTIONS), LOAD, None)
    assert found.spills and found.plan.gptq.work == WorkSizes()


def test_a_limit_that_is_too_small_says_what_would_fit(small_program: None) -> None:
    with pytest.raises(UsageError, match="--max-memory 1.0 GiB: this run takes about .* GiB"):
        fitted(1 << 30)
    with pytest.raises(UsageError, match="allow as much .--threads 1 takes about .* MiB"):
        fitted(1 << 20, QuantizeOptions(method="rtn"))


def test_memory_does_not_depend_on_the_number_of_layers() -> None:
    two, all_layers = (shape_config("27b", layers) for layers in (2, 62))
    for options in (OPTIONS, QuantizeOptions(method="rtn")):
        bases = [footprint(c, plan_of(c, options), LOAD).base for c in (two, all_layers)]
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
    monkeypatch.setattr("uq.quantize.job.fit", always_spilled)
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
