"""Calibration: which inputs each linear sees, layer by layer, on the path quantized so far.

A layer has four stages, cut where the inputs of its linears appear. At each stage the second
moments of the inputs are taken, the linears that read them are quantized, and the tokens go on
through the quantized linears. A second copy of the tokens can follow the floating-point weights, so
that the quantized path is also corrected towards it.

From gemma2 on, the outputs of o_proj and down_proj are normalized before they join the residual
stream. An error of such an output matters relative to the output's size, which differs by orders of
magnitude between tokens, so there each token is weighed by the inverse of its mean square.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import repeat

import numpy as np
from numpy.typing import NDArray

from uq.formats.config import GemmaConfig
from uq.kernels.reference import (
    add_attention,
    add_mlp,
    attention_context,
    attention_input,
    embed,
    flat,
    mlp_hidden,
    mlp_input,
)
from uq.quantize.gptq import Statistics
from uq.quantize.moments import Inputs, statistics, token_weights, undo_norm

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
    """Linears that share an input, and the way there from the stage before.

    Attributes:
        norm: role of the norm that takes the output to the residual stream, in models that have it;
            None where the output does not join the stream.
    """

    roles: tuple[str, ...]
    enter: Callable[[GemmaConfig, int, Weights, Batch], Batch]
    norm: str | None = None


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
    Stage(("self_attn.o_proj",), _enter_context, "post_attention_layernorm"),
    Stage(("mlp.gate_proj", "mlp.up_proj"), _enter_mlp),
    Stage(("mlp.down_proj",), _enter_mlp_hidden, "post_feedforward_layernorm"),
)
EXIT = Stage((), _leave)

# Roles of a stage and the statistics of their input -> role -> weight that the tokens go on with.
QuantizeStage = Callable[[Sequence[str], Statistics], Mapping[str, Array]]


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


class Calibration:
    """The calibration tokens in front of some layer.

    Memory: the activations of one stage for every token, on one or two paths.
    """

    def __init__(
        self, config: GemmaConfig, quantized: Array, exact: Array | None, *, clip: float = 1.0
    ) -> None:
        """Begin in front of layer 0.

        Args:
            quantized: (sequences, length, hidden) rows of the quantized embedding.
            exact: the same of the checkpoint's; None leaves the floating-point path out.
            clip: largest ratio of a token's weight to the median token's, and of the median's to
                it.
        """
        self._config = config
        self._clip = clip
        self._quantized = Path(config, quantized)
        self._exact = None if exact is None else Path(config, exact)

    def quantize_layer(self, layer: int, weights: Weights, quantize: QuantizeStage) -> None:
        """Quantize a layer stage by stage, and move the tokens behind it.

        Args:
            weights: role -> float32 weight or gain.
            quantize: called once per stage.
        """
        mixed = dict(weights)
        for stage in STAGES:
            self._go(stage, layer, mixed, weights)
            mixed |= quantize(stage.roles, self._statistics(stage, weights))
        self._go(EXIT, layer, mixed, weights)

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

    def _statistics(self, stage: Stage, weights: Weights) -> Statistics:
        """Of the stage's input; `weights` are the checkpoint's."""
        pairs = list(self._pairs())
        inputs = [Inputs(flat(q.x), None if e is None else flat(e.x)) for q, e in pairs]
        if stage.norm is None:
            return statistics(inputs)
        lost = [None if e is None else flat(e.hidden - q.hidden) for q, e in pairs]
        if not self._config.post_norms:
            return statistics([replace(i, lost=r) for i, r in zip(inputs, lost, strict=True)])
        sizes = [
            self._size(x.x if x.exact is None else x.exact, weights[stage.roles[0]]) for x in inputs
        ]
        gain = weights[stage.norm]
        return statistics(
            [
                replace(i, weight=w, lost=None if r is None else undo_norm(r, size, gain))
                for i, w, r, size in zip(
                    inputs, token_weights(sizes, self._clip), lost, sizes, strict=True
                )
            ]
        )

    def _pairs(self) -> Iterator[tuple[Batch, Batch | None]]:
        """Batches of the quantized path, each with its double on the floating-point path."""
        if self._exact is None:
            return zip(self._quantized.batches, repeat(None))
        return zip(self._quantized.batches, self._exact.batches, strict=True)

    def _size(self, x: Array, weight: Array) -> Array:
        """(tokens, 1): mean square of each token's output, as the norm behind it takes it."""
        outputs = x @ weight.T
        sizes: Array = np.mean(outputs**2, axis=-1, keepdims=True)
        return sizes + np.float32(self._config.rms_norm_eps)
