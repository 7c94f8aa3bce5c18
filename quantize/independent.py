"""Layers calibrated on what the floating-point layers before them make of the text.

In order, a layer is calibrated on what the quantized layers before it make of the text, and makes
up for a part of what they have lost. Here nothing but the checkpoint and the text goes into a
layer, so that any machine can quantize any layer. Within a layer the stages follow each other as
ever.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from uq.formats.checkpoint import Checkpoint
from uq.formats.entries import Entry, QuantEntry, TiledRows
from uq.formats.spec import QuantTensor
from uq.kernels.per_layer import Beside
from uq.kernels.reference import embed, layer_forward
from uq.kernels.weights import CheckpointWeights, LayerWeights
from uq.progress import Progress, SilentProgress
from uq.quantize.activations import Batch
from uq.quantize.calibrate import NumpyEngine
from uq.quantize.farm import Chain, Farm
from uq.quantize.layers import LayerQuantizer, Written, options_of
from uq.quantize.memory import Load, fit
from uq.quantize.plan import Plan
from uq.quantize.token_rows import PerLayerRows, stream_maker

Tokens = NDArray[np.int32]


@dataclass(frozen=True)
class LayerTask:
    """A layer to quantize.

    Attributes:
        load: of the whole calibration text.
        engine: where it is calibrated; None: main memory, or the disk, as there is room.
    """

    layer: int
    plan: Plan
    load: Load
    engine: NumpyEngine | None

    def __str__(self) -> str:
        return f"layer {self.layer}"


@dataclass(frozen=True)
class Source:
    """What a layer was made from: tensor -> hash of its content."""

    contents: dict[str, str]


class IndependentLayers:
    """Layers that a farm quantizes, side by side where it has the machines."""

    def __init__(
        self,
        farm: Farm,
        plan: Plan,
        tokens: Tokens,
        layers: range,
        engine: NumpyEngine | None,
        progress: Progress,
        contents: MutableMapping[str, str],
    ) -> None:
        """Begins at once.

        Args:
            contents: the hashes of the layers that are quantized are entered here.
            tokens: (sequences, length).
            layers: those that are wanted, up to the last; the text goes through all before them.
            engine: of this machine; None where others do the work.
        """
        self._progress, self._contents = progress, contents
        load = Load(tokens.size, tokens.shape[1], threads=1)
        tasks = [LayerTask(number, plan, load, engine) for number in range(layers.stop)]
        pieces = token_batches(tokens, plan)
        self._found = farm.follow(LAYERS, pieces, tasks, first=layers.start)

    def quantize(self, layer: int) -> list[Entry]:
        """Bundle entries of a layer; the next call is for the next layer."""
        parts = next(self._found)
        entries = [part for part in parts if not isinstance(part, Source)]
        for entry in entries:
            if isinstance(entry, QuantEntry) and entry.fallback is not None:
                self._progress.note(f"{entry.name}: {entry.fallback}")
        for part in parts:
            if isinstance(part, Source):
                self._contents.update(part.contents)
        return entries

    def skip(self, layer: int, read: Callable[[int], Written]) -> None:
        """Nothing: what was quantized is not needed."""


def token_batches(tokens: Tokens, plan: Plan) -> list[Tokens]:
    """The sequences in the groups in which sums over them are taken."""
    step = max(1, plan.gptq.work.batch_tokens // tokens.shape[1])
    return [tokens[start : start + step] for start in range(0, len(tokens), step)]


@np.errstate(over="ignore", invalid="ignore")
def enter(checkpoint: Checkpoint, tokens: Tokens) -> Batch:
    """Some sequences in front of layer 0."""
    weights = CheckpointWeights(checkpoint, resident=False)
    hidden = embed(checkpoint.config, weights.embedding(tokens))
    if checkpoint.config.per_layer is None:
        return Batch.between_layers(hidden, Beside())
    maker = stream_maker(weights, checkpoint.config)
    streams = None if maker is None else maker(hidden)
    return Batch.between_layers(hidden, Beside(hidden, streams=streams, tokens=tokens))


@np.errstate(over="ignore", invalid="ignore")
def pass_layer(checkpoint: Checkpoint, task: LayerTask, states: Iterable[Batch]) -> Iterator[Batch]:
    """The sequences behind the floating-point layer."""
    weights = LayerWeights(checkpoint, task.layer, resident=False)
    for state in states:
        beside = _beside(checkpoint, state)
        hidden = layer_forward(checkpoint.config, task.layer, weights, state.hidden, beside=beside)
        yield Batch.between_layers(hidden, replace(beside, rows=None))


def _beside(checkpoint: Checkpoint, state: Batch) -> Beside:
    """A copy, which a layer may change, with rows of the checkpoint that is open here."""
    beside, rows = state.beside, None
    if beside.tokens is not None:
        rows = PerLayerRows(checkpoint, beside.tokens, None)
    return replace(beside, rows=rows, shared=dict(beside.shared))


def calibrate_layer(
    checkpoint: Checkpoint, task: LayerTask, states: Iterable[Batch], progress: Progress
) -> list[Entry | Source]:
    """Bundle entries of the layer, in the layout that they are stored in; says no note.

    Args:
        states: the sequences in front of the layer.
    """
    config, plan = checkpoint.config, task.plan
    engine = task.engine or _engine_here(checkpoint, task)
    calibration = engine.begin(config, (), options_of(plan))
    for state in states:
        quantized, exact = (replace(state, beside=_beside(checkpoint, state)) for _ in range(2))
        calibration.add(quantized, exact if plan.corrected else None)
    contents: dict[str, str] = {}
    quantizer = LayerQuantizer(checkpoint, plan, WorkOnly(progress), contents)
    weights = checkpoint.layer(task.layer, contents)
    entries = quantizer.quantize(task.layer, weights, calibration)
    return [*map(_tiled, entries), Source(contents)]


LAYERS = Chain(enter, calibrate_layer, pass_layer)


class WorkOnly(SilentProgress):
    """Names what is in work."""

    def __init__(self, outer: Progress) -> None:
        self._outer = outer

    def work(self, what: str) -> None:
        self._outer.work(what)


def _engine_here(checkpoint: Checkpoint, task: LayerTask) -> NumpyEngine:
    fitted = fit(checkpoint.config, task.plan, task.load, None)
    return NumpyEngine(Path(tempfile.gettempdir()) if fitted.spills else None)


def _tiled(entry: Entry) -> Entry:
    if not isinstance(entry, QuantEntry):
        return entry
    blocks = [
        TiledRows.of(block, entry.layout) if isinstance(block, QuantTensor) else block
        for block in entry.blocks
    ]
    return replace(entry, blocks=blocks)
