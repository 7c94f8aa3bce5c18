"""Layers that are read while the one before is in work."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from threading import Event

import numpy as np
import pytest
from numpy.typing import NDArray

from uq.errors import CheckpointError
from uq.formats.checkpoint import Checkpoint, open_checkpoint
from uq.quantize.background import LayersAhead, Writing
from uq.quantize.calibrate import NumpyEngine
from uq.quantize.pipeline import QuantizeOptions, quantize

Tiny = Callable[..., Path]
Layer = dict[str, NDArray[np.float32]]


class Elsewhere(NumpyEngine):
    """Main memory, as if it were another one."""

    @property
    def elsewhere(self) -> bool:
        return True


def idle() -> Event:
    """Nothing is being written."""
    event = Event()
    event.set()
    return event


def reading(monkeypatch: pytest.MonkeyPatch) -> list[Event]:
    """Set as each of three layers begins to be read."""
    read, begun = Checkpoint.layer, [Event() for _ in range(3)]

    def noted(self: Checkpoint, index: int, contents: dict[str, str]) -> Layer:
        begun[index].set()
        return read(self, index, contents)

    monkeypatch.setattr(Checkpoint, "layer", noted)
    return begun


def test_the_next_layer_is_read_before_it_is_asked_for(
    tiny_checkpoint: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = reading(monkeypatch)
    layers = LayersAhead(open_checkpoint(tiny_checkpoint(layers=3)), {}, idle())
    layers(0)
    assert begun[1].wait(10)
    assert not begun[2].is_set()


def test_nothing_is_read_ahead_while_a_layer_is_being_written(
    tiny_checkpoint: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = reading(monkeypatch)
    with Writing() as writing:
        layers = LayersAhead(open_checkpoint(tiny_checkpoint(layers=3)), {}, writing.idle)
        layers(0)
        assert begun[1].wait(10)
        written = Event()
        writing.start(lambda: assert_waited(written))
        layers(1)
        early = begun[2].wait(0.2)
        written.set()
        assert begun[2].wait(10)
        assert not early


def assert_waited(event: Event) -> None:
    assert event.wait(10)


def test_what_writing_raised_is_raised_by_the_next(tmp_path: Path) -> None:
    with Writing() as writing:
        writing.start(lambda: (tmp_path / "missing" / "file").write_text(""))
        with pytest.raises(FileNotFoundError):
            writing.start(print)
        assert writing.idle.is_set()


def test_every_layer_comes_with_its_hashes(tiny_checkpoint: Tiny) -> None:
    checkpoint = open_checkpoint(tiny_checkpoint(layers=3))
    ahead, alone = dict[str, str](), dict[str, str]()
    layers = LayersAhead(checkpoint, ahead, idle())
    for index in (1, 2):  # a resumed run begins somewhere
        found, expected = layers(index), checkpoint.layer(index, alone)
        assert found.keys() == expected.keys()
        assert all(np.array_equal(found[role], expected[role]) for role in expected)
    assert ahead == alone


def test_a_broken_layer_is_told_when_its_turn_comes(
    tiny_checkpoint: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = Checkpoint.layer

    def broken(self: Checkpoint, index: int, contents: dict[str, str]) -> Layer:
        if index == 1:
            raise CheckpointError("layer 1 is broken")
        return read(self, index, contents)

    monkeypatch.setattr(Checkpoint, "layer", broken)
    layers = LayersAhead(open_checkpoint(tiny_checkpoint(layers=2)), {}, idle())
    layers(0)
    with pytest.raises(CheckpointError, match="layer 1 is broken"):
        layers(1)


def test_reading_ahead_changes_no_byte(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny_checkpoint(layers=3, hidden=64, ffn=128, head_dim=16))
    options = QuantizeOptions(group=32, calibration_tokens=80, calibration_length=40)
    made = [
        quantize(checkpoint, tmp_path / name, options, engine=engine)
        for name, engine in (("here", NumpyEngine()), ("elsewhere", Elsewhere()))
    ]
    here, elsewhere = ({p.name: p.read_bytes() for p in folder.iterdir()} for folder in made)
    assert here == elsewhere
