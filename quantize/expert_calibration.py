"""Calibration of a mixture of experts: one expert at a time, on the tokens that choose it.

A token counts by the square of its share in the expert, which is what its error is multiplied by.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from uq.formats.config import GemmaConfig
from uq.kernels.experts import DOWN, GATE_UP, chosen, expert_hidden, experts_input, leave_experts
from uq.kernels.products import linear
from uq.quantize.activations import Batch
from uq.quantize.calibration_engine import Array, ExpertWork, Weights
from uq.quantize.gptq import Statistics
from uq.quantize.moments import Inputs, statistics
from uq.quantize.plan import WorkSizes


class Routed:
    """A batch of tokens, told by expert, and what the experts give for them.

    Attributes:
        x: (tokens, hidden) input of the experts.
        places: expert -> its tokens, and its share in each.
    """

    def __init__(self, config: GemmaConfig, weights: Weights, hidden: Array) -> None:
        self.x = experts_input(config, weights, hidden)
        found = chosen(config, weights, hidden)
        self.places = {number: (tokens, shares) for number, tokens, shares in found}
        self._out = np.zeros_like(self.x)
        self._config, self._weights, self._shape = config, weights, hidden.shape

    def inputs(self, number: int) -> tuple[Array, Array]:
        """(tokens, hidden) of an expert's tokens, and its shares in them, (tokens,)."""
        tokens, shares = self.places.get(number, (np.empty(0, np.intp), np.empty(0, np.float32)))
        return self.x[tokens], shares

    def add(self, number: int, y: Array, down: Array) -> None:
        """Take an expert's output; `y` (tokens, intermediate) is the input of `down`."""
        if number in self.places:
            tokens, shares = self.places[number]
            self._out[tokens] += linear(y, down) * shares[:, None]

    def finish(self) -> Array:
        """(batch, length, hidden): what joins the output of the layer's own MLP."""
        return leave_experts(self._config, self._weights, self._out).reshape(self._shape)


def calibrate_experts(
    config: GemmaConfig,
    weights: Weights,
    quantized: Iterable[Batch],
    exact: Iterable[Batch],
    work: ExpertWork,
    sizes: WorkSizes,
) -> None:
    """Quantize every expert of a layer, and leave their outputs with the batches.

    Args:
        weights: of the layer; norms and the router are used.
        quantized, exact: the tokens in front of the MLP on both paths; the second may be empty.
    """
    assert config.experts is not None
    pairs = [
        [(batch, Routed(config, weights, batch.hidden)) for batch in path]
        for path in (quantized, exact)
    ]
    ours, theirs = ([routed for _, routed in path] for path in pairs)
    for number in range(config.experts.count):
        _quantize_expert(number, ours, work, sizes)
        if theirs:
            gate_up, down = work.read(GATE_UP, number), work.read(DOWN, number)
            for routed in theirs:
                routed.add(number, expert_hidden(gate_up, routed.inputs(number)[0]), down)
    for batch, routed in (pair for path in pairs for pair in path):
        batch.beside.experts = routed.finish()


def _quantize_expert(
    number: int, routed: Sequence[Routed], work: ExpertWork, sizes: WorkSizes
) -> None:
    inputs = [batch.inputs(number) for batch in routed]
    tokens = sum(len(x) for x, _ in inputs)
    gate_up = work.quantize(GATE_UP, number, tokens, _moments(inputs, sizes))
    hidden = [(expert_hidden(gate_up, x), shares) for x, shares in inputs]
    down = work.quantize(DOWN, number, tokens, _moments(hidden, sizes))
    for batch, (y, _) in zip(routed, hidden, strict=True):
        batch.add(number, y, down)


def _moments(inputs: Sequence[tuple[Array, Array]], sizes: WorkSizes) -> Statistics | None:
    seen = [(x, shares) for x, shares in inputs if len(x)]
    if not seen:
        return None
    return statistics((Inputs(x, weight=(shares**2)[:, None]) for x, shares in seen), sizes)
