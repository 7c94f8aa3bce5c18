"""Recipes tried side by side."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from uq import sweep as module
from uq.cli import main
from uq.formats.bundle import open_bundle
from uq.formats.checkpoint import open_checkpoint
from uq.progress import SilentProgress
from uq.quantize.pipeline import QuantizeOptions, quantize
from uq.sweep import Outcome, Trial, is_best, outcome_table, sweep
from uq.validate.validate import ValidateOptions, validate

TEXT = "the time of the world and the city in which they were not one of the first " * 20
SMALL = Outcome("small", 4.25, 100, 0.5, 0.01, 80.0, 1.2, 0.01, 60.0)


def trial(name: str, text: Path, **options: object) -> Trial:
    chosen = QuantizeOptions(method="rtn", **options)  # type: ignore[arg-type]
    return Trial(name, chosen, "plain", "plain", text, context=32, chunks=4)


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Callable[..., Path]) -> Path:
    return tiny_checkpoint()


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def test_a_sweep_finds_what_quantizing_and_validating_find(model: Path, text: Path) -> None:
    checkpoint = open_checkpoint(model)
    trials = [trial("int4", text, recipe="int4"), trial("int8", text, recipe="int8")]
    four, eight = sweep(checkpoint, trials, SilentProgress())
    bundle = quantize(checkpoint, text.with_name("b"), trials[0].options)
    options = ValidateOptions(device="cpu", text=text, context=32, max_chunks=4, speed=False)
    report = validate(open_bundle(bundle), checkpoint, options)
    assert (four.kld, four.same_top_percent) == (report.kld.mean, report.same_top_percent)
    assert (four.bytes, four.bits_per_weight) == (
        report.bundle.bytes,
        report.bundle.bits_per_weight,
    )
    assert eight.bytes > four.bytes and eight.kld < four.kld


def test_what_was_tried_is_not_tried_again(
    model: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[str] = []

    def evaluate(checkpoint: object, trial: Trial, progress: object) -> Outcome:
        tried.append(trial.name)
        if trial.name == "broken":
            raise KeyboardInterrupt
        return replace(SMALL, name=trial.name)

    monkeypatch.setattr(module, "evaluate", evaluate)
    checkpoint, kept = open_checkpoint(model), text.with_name("tried.json")
    first, last = trial("int4", text), trial("int8", text, recipe="int8")
    with pytest.raises(KeyboardInterrupt):
        sweep(checkpoint, [first, trial("broken", text)], SilentProgress(), kept=kept)
    found = sweep(checkpoint, [first, last], SilentProgress(), kept=kept)
    assert [outcome.name for outcome in found] == ["int4", "int8"]
    assert tried == ["int4", "broken", "int8"]
    sweep(checkpoint, [replace(first, context=16)], SilentProgress(), kept=kept)
    assert tried[3:] == ["int4"]


def test_a_text_or_model_that_was_changed_is_tried_again(
    tiny_checkpoint: Callable[..., Path], text: Path
) -> None:
    folder, asked = tiny_checkpoint(), trial("int4", text)
    before = asked.key(open_checkpoint(folder))
    assert asked.key(open_checkpoint(folder)) == before
    text.write_text(text.read_text() + "more")
    changed = asked.key(open_checkpoint(folder))
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"rms_norm_eps": 0.3}))
    assert len({before, changed, asked.key(open_checkpoint(folder))}) == 3


class Stopped(SilentProgress):
    """Ctrl-C in a trial's second layer."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def work(self, what: str) -> None:
        if what.endswith("layer 1"):
            raise KeyboardInterrupt

    def note(self, text: str) -> None:
        self.notes.append(text)


def test_nobody_is_sent_to_a_folder_that_is_gone(model: Path, text: Path) -> None:
    progress = Stopped()
    with pytest.raises(KeyboardInterrupt):
        sweep(open_checkpoint(model), [trial("int4", text, recipe="int4")], progress)
    assert not any(".partial" in note for note in progress.notes)


def test_the_table_marks_what_nothing_smaller_reaches() -> None:
    worse = replace(SMALL, name="worse", bytes=200, kld=0.6)
    large = replace(SMALL, name="large", bytes=300, kld=0.1)
    outcomes = [large, worse, SMALL]
    assert [is_best(outcome, outcomes) for outcome in outcomes] == [True, False, True]
    head, *lines = outcome_table(outcomes).splitlines()
    assert head.split()[:2] == ["recipe", "bits/weight"]
    assert [line.split()[0] for line in lines] == ["small", "worse", "large"]
    assert ["<-" in line for line in lines] == [True, False, True]


def test_the_command_prints_json(
    model: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--text", str(text), "--format", "plain", "--context", "32", "--chunks", "4", "--json"]
    recipes = ["--recipe", "int8,method=rtn", "--recipe", "int4,method=rtn,group=64"]
    assert main(["sweep", str(model), *recipes, *words]) == 0
    first, second = json.loads(capsys.readouterr().out)["outcomes"]
    assert first["name"] == "int8,method=rtn" and second["best"] is True
    assert first["bytes"] > second["bytes"]


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("int3", "int3 is not one of int4,"),
        ("int4,group=", "group= is not one of"),
        ("int4,method=awq", "method awq is not one of auto, rtn, gptq"),
        ("group=64", "give one recipe or bpw="),
        ("int4,bpw=5", "give one recipe or bpw="),
        ("bpw=much", "expected a number above 0"),
        ("bpw=nan", "expected a number above 0"),
        ("int4,group=32,group=64", "group is given twice"),
    ],
)
def test_a_recipe_that_is_none_is_refused(
    recipe: str, message: str, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sweep", str(model), "--recipe", recipe]) == 2
    assert message in capsys.readouterr().err
