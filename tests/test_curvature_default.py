"""Where the rows of linears are rounded together without being asked for, and where not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from uq.errors import UsageError
from uq.formats.checkpoint import open_checkpoint
from uq.progress import SilentProgress
from uq.quantize.calibrate import NumpyEngine
from uq.quantize.job import plan_of, prepared
from uq.quantize.options import QuantizeOptions
from uq.quantize.plan import RECIPES

INDEPENDENTLY = QuantizeOptions(calibrate_layers="independently")


class Notes(SilentProgress):
    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, text: str) -> None:
        self.said.append(text)


def test_recipes_of_few_bits_have_it_without_being_asked(
    tiny_checkpoint: Callable[..., Path], shipped_recipes: None
) -> None:
    config = open_checkpoint(tiny_checkpoint()).config
    for name in RECIPES:
        assert plan_of(config, QuantizeOptions(name)).bends is (name != "int8")
        assert not plan_of(config, QuantizeOptions(name, curvature=False)).bends
        assert not plan_of(config, QuantizeOptions(name, method="rtn")).bends
    assert plan_of(config, QuantizeOptions(bpw=6.0)).bends
    assert plan_of(config, QuantizeOptions("int8", curvature=True)).bends


@pytest.mark.parametrize(
    ("options", "engine", "reason"),
    [
        (
            QuantizeOptions(calibrate_layers="independently"),
            None,
            "needs layers calibrated in order",
        ),
        (QuantizeOptions(), NumpyEngine(), "is measured on the CPU only"),
        (QuantizeOptions(), None, None),
        (QuantizeOptions(curvature=False), NumpyEngine(), None),
        (QuantizeOptions("int8"), None, None),
        (QuantizeOptions(method="rtn"), None, None),
    ],
)
def test_a_run_that_did_not_ask_for_it_goes_without_and_says_why(
    tiny_checkpoint: Callable[..., Path],
    shipped_recipes: None,
    options: QuantizeOptions,
    engine: NumpyEngine | None,
    reason: str | None,
) -> None:
    notes = Notes()
    job = prepared(open_checkpoint(tiny_checkpoint()), options, notes, engine, None)
    assert notes.said == ([f"without --curvature, which {reason}"] if reason else [])
    assert not (reason and job.plan.bends)


def test_newer_families_have_it(
    tiny_gemma4: Callable[..., Path], tiny_gemma3n: Callable[..., Path], shipped_recipes: None
) -> None:
    for folder in (tiny_gemma4("all"), tiny_gemma3n("plain")):
        assert plan_of(open_checkpoint(folder).config, QuantizeOptions(group=32)).bends


def test_a_layer_whose_gradient_is_not_known_goes_without(
    tiny_gemma4: Callable[..., Path], shipped_recipes: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("uq.quantize.job.GRADIENTS", frozenset())
    checkpoint, notes = open_checkpoint(tiny_gemma4("small")), Notes()
    assert not prepared(checkpoint, QuantizeOptions(group=32), notes, None, None).plan.bends
    assert "without --curvature, which does not compute" in notes.said[0]
    with pytest.raises(UsageError, match="--curvature does not compute .* leave it out"):
        prepared(checkpoint, QuantizeOptions(group=32, curvature=True), notes, None, None)


def test_too_small_a_limit_does_without_unless_it_is_asked_for(
    tiny_checkpoint: Callable[..., Path], shipped_recipes: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("uq.quantize.memory._gradient_bytes", lambda *args: 1 << 40)
    checkpoint, notes = open_checkpoint(tiny_checkpoint()), Notes()
    options = QuantizeOptions(max_memory=1 << 34)
    assert not prepared(checkpoint, options, notes, None, None).plan.bends
    assert notes.said == ["without --curvature, which does not fit into --max-memory"]
    with pytest.raises(UsageError, match="--max-memory"):
        prepared(checkpoint, replace(options, curvature=True), notes, None, None)
