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

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import repeat

import numpy as np

from uq.formats.config import GemmaConfig
from uq.kernels.reference import (
    add_attention,
    add_mlp,
    attention_context,
    attention_input,
    embed,
    flat,
    linear,
    mlp_hidden,
    mlp_input,
)
from uq.quantize.calibration_engine import Array, TokenRows, Weights
from uq.quantize.gptq import Statistics
from uq.quantize.moments import Inputs, mean_square, statistics, token_weights, undo_norm
from uq.quantize.plan import GptqOptions

BATCH_TOKENS = 4096
PLAIN = GptqOptions(clip=1.0)


@dataclass(frozen=True)
class Batch:
    """Some sequences on their way through a layer.

    Attributes:
        hidden: (sequences, length, hidden) residual stream.
        x: (sequences, length, n) input of the current stage's linears.
        out: (sequences, length, hidden) output of the stage's linear, where it is already known.
    """

    hidden: Array
    x: Array
    out: Array | None = None


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
    hidden = add_attention(config, weights, batch.hidden, batch.x, batch.out)
    return Batch(hidden, mlp_input(config, weights, hidden))


def _enter_mlp_hidden(config: GemmaConfig, layer: int, weights: Weights, batch: Batch) -> Batch:
    return Batch(batch.hidden, mlp_hidden(config, weights, batch.x))


def _leave(config: GemmaConfig, layer: int, weights: Weights, batch: Batch) -> Batch:
    hidden = add_mlp(config, weights, batch.hidden, batch.x, batch.out)
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

    `rows` are the embedding's rows for the tokens: a (sequences, length, hidden) per batch.
    """

    def __init__(self, config: GemmaConfig, rows: Iterable[Array]) -> None:
        self._config = config
        hidden = (embed(config, part) for part in rows)
        self.batches = [Batch(part, part) for part in hidden]

    def go(self, stage: Stage, layer: int, weights: Weights) -> None:
        """Move every batch to the input of a stage."""
        for index, batch in enumerate(self.batches):
            self.batches[index] = stage.enter(self._config, layer, weights, batch)


class Calibration:
    """The calibration tokens in front of some layer.

    Memory: the activations of one stage for every token, on one or two paths.
    """

    def __init__(
        self, config: GemmaConfig, rows: Iterable[TokenRows], options: GptqOptions = PLAIN
    ) -> None:
        """Begin in front of layer 0; the arguments are those of `CalibrationEngine.begin`."""
        self._config = config
        self._options = options
        batches = list(rows)
        self._quantized = Path(config, (batch.quantized for batch in batches))
        exact = [batch.exact for batch in batches if batch.exact is not None]
        self._exact = Path(config, exact) if exact else None

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

    def pass_layer(self, layer: int, exact: Weights, quantized: Weights) -> None:
        """Move the tokens behind a layer that was quantized earlier.

        Args:
            exact: of the checkpoint; empty when the floating-point path is left out.
            quantized: role -> dequantized weight, or gain.
        """
        for stage in (*STAGES, EXIT):
            self._go(stage, layer, quantized, exact)

    def _go(self, stage: Stage, layer: int, quantized: Weights, exact: Weights) -> None:
        self._quantized.go(stage, layer, quantized)
        if self._exact is not None:
            self._exact.go(stage, layer, exact)

    def _statistics(self, stage: Stage, weights: Weights) -> Statistics:
        """Of the stage's input; `weights` are the checkpoint's."""
        if stage.norm is None:
            return statistics(
                [Inputs(flat(q.x), None if e is None else flat(e.x)) for q, e in self._pairs()]
            )
        weight = weights[stage.roles[0]]
        outputs = self._outputs(weight)
        sizes = [self._size(out) for out in outputs]
        inputs = [Inputs(flat(batch.x)) for batch in self._quantized.batches]
        if self._config.post_norms:
            counts = token_weights(sizes, self._options.clip)
            inputs = [replace(i, weight=count) for i, count in zip(inputs, counts, strict=True)]
        if self._exact is None:
            return statistics(inputs)
        gain = weights[stage.norm] if self._config.post_norms else None
        wanted = self._wanted(outputs, sizes, gain)
        inputs = [replace(i, wanted=w) for i, w in zip(inputs, wanted, strict=True)]
        found = statistics(inputs)
        assert found.wanted is not None
        # sum (W x_float - W x) x^T = sum (W x_float) x^T - W H
        present = self._options.correction * (weight.astype(np.float64) @ found.hessian)
        return replace(found, wanted=found.wanted - present)

    def _outputs(self, weight: Array) -> list[Array]:
        """(tokens, hidden) per batch of a linear that writes to the residual stream.

        On the floating-point path where it is followed, which keeps them.
        """
        path = self._quantized if self._exact is None else self._exact
        outputs = [linear(batch.x, weight) for batch in path.batches]
        if self._exact is not None:
            path.batches = [
                replace(batch, out=out) for batch, out in zip(path.batches, outputs, strict=True)
            ]
        return [flat(out) for out in outputs]

    def _wanted(
        self, outputs: Sequence[Array], sizes: Sequence[Array], gain: Array | None
    ) -> Iterator[Array]:
        """(tokens, hidden) per batch: what the outputs should be, in part, and add besides."""
        assert self._exact is not None
        correction = np.float32(self._options.correction)
        residual = np.float32(self._options.residual)
        batches = zip(self._exact.batches, self._quantized.batches, outputs, sizes, strict=True)
        for exact, quantized, out, size in batches:
            lost = flat(exact.hidden - quantized.hidden)
            if gain is not None:
                lost = undo_norm(lost, size, gain)
            yield correction * out + residual * lost

    def _pairs(self) -> Iterator[tuple[Batch, Batch | None]]:
        """Batches of the quantized path, each with its double on the floating-point path."""
        if self._exact is None:
            return zip(self._quantized.batches, repeat(None))
        return zip(self._quantized.batches, self._exact.batches, strict=True)

    def _size(self, outputs: Array) -> Array:
        """(tokens, 1): mean square of each token's output, as the norm behind it takes it."""
        return mean_square(outputs) + np.float32(self._config.rms_norm_eps)


class NumpyEngine:
    """Calibrates in main memory, its products by BLAS."""

    def begin(
        self, config: GemmaConfig, rows: Iterable[TokenRows], options: GptqOptions
    ) -> Calibration:
        return Calibration(config, rows, options)
