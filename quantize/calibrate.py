"""Calibration: which inputs each linear sees, layer by layer, on the path quantized so far.

A layer has four stages, cut where the inputs of its linears appear. At each stage the second
moments of the inputs are taken, the linears that read them are quantized, and the tokens go on
through the quantized linears. A second copy of the tokens can follow the floating-point weights, so
that the quantized path is also corrected towards it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce

import numpy as np
from numpy.typing import NDArray

from uq.formats.config import GemmaConfig
from uq.formats.spec import QuantTensor
from uq.kernels.reference import (
    add_attention,
    add_mlp,
    attention_context,
    attention_input,
    embed,
    mlp_hidden,
    mlp_input,
)
from uq.quantize.gptq import Matrix, Statistics

Array = NDArray[np.float32]
Weights = Mapping[str, Array]
BATCH_TOKENS = 4096


@dataclass(frozen=True)
class Batch:
    """Some sequences on their way through a layer.

    Attributes:
        hidden: (sequences, length, hidden) residual stream.
        x: (sequences, length, n) input of the current stage's linears.
    """

    hidden: Array
    x: Array


@dataclass(frozen=True)
class Stage:
    """Linears that share an input, and the way there from the stage before."""

    roles: tuple[str, ...]
    enter: Callable[[GemmaConfig, int, Weights, Batch], Batch]


def _enter_attention(config: GemmaConfig, layer: int, weights: Weights, batch: Batch) -> Batch:
    return Batch(batch.hidden, attention_input(config, weights, batch.hidden))


def _enter_context(config: GemmaConfig, layer: int, weights: Weights, batch: Batch) -> Batch:
    return Batch(batch.hidden, attention_context(config, layer, weights, batch.x))


def _enter_mlp(config: GemmaConfig, layer: int, weights: Weights, batch: Batch) -> Batch:
    hidden = add_attention(config, weights, batch.hidden, batch.x)
    return Batch(hidden, mlp_input(config, weights, hidden))


def _enter_mlp_hidden(config: GemmaConfig, layer: int, weights: Weights, batch: Batch) -> Batch:
    return Batch(batch.hidden, mlp_hidden(config, weights, batch.x))


def _leave(config: GemmaConfig, layer: int, weights: Weights, batch: Batch) -> Batch:
    hidden = add_mlp(config, weights, batch.hidden, batch.x)
    return Batch(hidden, hidden)


STAGES = (
    Stage(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), _enter_attention),
    Stage(("self_attn.o_proj",), _enter_context),
    Stage(("mlp.gate_proj", "mlp.up_proj"), _enter_mlp),
    Stage(("mlp.down_proj",), _enter_mlp_hidden),
)
EXIT = Stage((), _leave)

QuantizeStage = Callable[[Sequence[str], Statistics], Mapping[str, QuantTensor]]


class Path:
    """All calibration tokens on one path, in batches of fixed size (so that sums keep their order).

    `rows` are the embedding's rows for the tokens: (sequences, length, hidden).
    """

    def __init__(self, config: GemmaConfig, rows: Array) -> None:
        self._config = config
        hidden = embed(config, rows)
        step = max(1, BATCH_TOKENS // hidden.shape[1])
        parts = [hidden[start : start + step] for start in range(0, len(hidden), step)]
        self.batches = [Batch(part, part) for part in parts]

    def go(self, stage: Stage, layer: int, weights: Weights) -> None:
        """Move every batch to the input of a stage."""
        for index, batch in enumerate(self.batches):
            self.batches[index] = stage.enter(self._config, layer, weights, batch)

    def inputs(self) -> list[Array]:
        """(tokens, n) of each batch."""
        return [batch.x.reshape(-1, batch.x.shape[-1]) for batch in self.batches]


class Calibration:
    """The calibration tokens in front of some layer.

    Memory: the activations of one stage for every token, on one or two paths.
    """

    def __init__(self, config: GemmaConfig, quantized: Array, exact: Array | None) -> None:
        """Begin in front of layer 0.

        Args:
            quantized: (sequences, length, hidden) rows of the quantized embedding.
            exact: the same of the checkpoint's; None leaves the floating-point path out.
        """
        self._quantized = Path(config, quantized)
        self._exact = None if exact is None else Path(config, exact)

    def quantize_layer(
        self, layer: int, weights: Weights, quantize: QuantizeStage
    ) -> dict[str, QuantTensor]:
        """Quantize a layer stage by stage, and move the tokens behind it.

        Args:
            weights: role -> float32 weight or gain.
            quantize: called once per stage with its roles and the statistics of their input.
        """
        found: dict[str, QuantTensor] = {}
        mixed = dict(weights)
        for stage in STAGES:
            self._go(stage, layer, mixed, weights)
            for role, tensor in quantize(stage.roles, self._statistics()).items():
                found[role] = tensor
                mixed[role] = tensor.dequantize()
        self._go(EXIT, layer, mixed, weights)
        return found

    def pass_layer(self, layer: int, weights: Weights, quantized: Weights) -> None:
        """Move the tokens behind a layer that was quantized earlier.

        Args:
            quantized: role -> dequantized weight, or gain.
        """
        for stage in (*STAGES, EXIT):
            self._go(stage, layer, quantized, weights)

    def _go(self, stage: Stage, layer: int, quantized: Weights, exact: Weights) -> None:
        self._quantized.go(stage, layer, quantized)
        if self._exact is not None:
            self._exact.go(stage, layer, exact)

    def _statistics(self) -> Statistics:
        inputs = self._quantized.inputs()
        tokens = sum(len(x) for x in inputs)
        hessian = _sum_products((x, x) for x in inputs) / tokens
        if self._exact is None:
            return Statistics(hessian, None)
        pairs = zip(inputs, self._exact.inputs(), strict=True)
        cross = _sum_products((exact - x, x) for x, exact in pairs) / tokens
        return Statistics(hessian, cross)


def _sum_products(pairs: Iterable[tuple[Array, Array]]) -> Matrix:
    """Sum of a^T b over pairs of (tokens, n) float32: products in float32, their sum in float64."""
    total: Matrix = reduce(np.add, ((a.T @ b).astype(np.float64) for a, b in pairs))
    return total
