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

from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from itertools import repeat
from pathlib import Path

import numpy as np

from uq.formats.config import (
    ALTUP,
    EXPERTS,
    FULL_HEADS,
    LAUREL,
    LAYER_SCALAR,
    MLP_WIDTHS,
    PER_LAYER,
    SHARED_KEYS,
    SPARSITY,
    VALUE_NORM,
    GemmaConfig,
)
from uq.kernels.per_layer import Beside
from uq.kernels.products import flat, linear
from uq.kernels.reference import (
    add_attention,
    add_mlp,
    attention_context,
    attention_input,
    embed,
    enter,
    leave,
    mlp_hidden,
    mlp_input,
)
from uq.quantize.activations import Activations, Batch, SpilledActivations
from uq.quantize.calibration_engine import Array, ExpertWork, TokenRows, Weights
from uq.quantize.expert_calibration import calibrate_experts
from uq.quantize.gptq import Statistics, row_blocks
from uq.quantize.moments import Inputs, mean_square, statistics, token_weights, undo_norm
from uq.quantize.plan import GptqOptions

PLAIN = GptqOptions(clip=1.0)


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
    hidden = enter(config, weights, batch.hidden, batch.beside)
    return batch.at(attention_input(config, weights, hidden), hidden)


def _enter_context(config: GemmaConfig, layer: int, weights: Weights, batch: Batch) -> Batch:
    context = attention_context(config, layer, weights, batch.x, beside=batch.beside)
    return batch.at(context)


def _enter_mlp(config: GemmaConfig, layer: int, weights: Weights, batch: Batch) -> Batch:
    hidden = add_attention(config, weights, batch.hidden, batch.x, batch.out)
    return batch.at(mlp_input(config, weights, hidden), hidden)


def _enter_mlp_hidden(config: GemmaConfig, layer: int, weights: Weights, batch: Batch) -> Batch:
    return batch.at(mlp_hidden(config, layer, weights, batch.x))


def _leave(config: GemmaConfig, layer: int, weights: Weights, batch: Batch) -> Batch:
    experts = batch.beside.experts
    hidden = add_mlp(config, weights, batch.hidden, batch.x, batch.out, experts)
    batch.beside.experts = None
    hidden = leave(config, layer, weights, hidden, batch.beside)
    return batch.at(hidden, hidden)


STAGES = (
    Stage(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), _enter_attention),
    Stage(("self_attn.o_proj",), _enter_context, "post_attention_layernorm"),
    Stage(("mlp.gate_proj", "mlp.up_proj"), _enter_mlp),
    Stage(("mlp.down_proj",), _enter_mlp_hidden, "post_feedforward_layernorm"),
)
# Where experts' outputs join it, an output has a norm of its own in front of the stage's.
BESIDE_EXPERTS = {"post_feedforward_layernorm": "post_feedforward_layernorm_1"}
# What `GemmaConfig.extensions` names and the stages follow.
FOLLOWED = frozenset(
    {FULL_HEADS, VALUE_NORM, SHARED_KEYS, MLP_WIDTHS, PER_LAYER, LAYER_SCALAR, EXPERTS}
    | {ALTUP, LAUREL, SPARSITY}
)
EXIT = Stage((), _leave)
# Roles of the stage that is entered -> the linears that led there.
PASSED = {
    after.roles: before.roles
    for before, after in zip((EXIT, *STAGES), (*STAGES, EXIT), strict=True)
}

# Roles of a stage and the statistics of their input -> role -> weight that the tokens go on with.
QuantizeStage = Callable[[Sequence[str], Statistics], Mapping[str, Array]]


class TokenPath:
    """All calibration tokens on one path, in batches of fixed size: sums keep their order."""

    def __init__(self, config: GemmaConfig, batches: Activations) -> None:
        """`batches` is where they wait; empty."""
        self._config = config
        self.batches = batches

    def add(self, batch: Batch) -> None:
        """The next batch, in front of a layer."""
        self.batches.append(batch)

    def go(self, stage: Stage, layer: int, weights: Weights) -> None:
        """Move every batch to the input of a stage."""
        for index, batch in enumerate(self.batches):
            self.batches[index] = stage.enter(self._config, layer, weights, batch)


def _start(config: GemmaConfig, rows: TokenRows, *, exact: bool) -> Batch:
    """A batch in front of layer 0."""
    found, per_layer = rows.quantized, rows.quantized_rows
    if exact:
        assert rows.exact is not None
        found, per_layer = rows.exact, rows.exact_rows
    hidden = embed(config, found)
    if per_layer is None:
        return Batch.between_layers(hidden, Beside())
    streams = None if rows.spread is None else rows.spread(hidden)
    return Batch.between_layers(hidden, Beside(hidden, per_layer, streams))


class Calibration:
    """The calibration tokens in front of some layer.

    In memory: the second moments of one stage, one batch of tokens, and what the layer's stages
    still need of its weights. The activations of all tokens only where `spill` is None.
    """

    def __init__(
        self,
        config: GemmaConfig,
        rows: Iterable[TokenRows],
        options: GptqOptions = PLAIN,
        spill: Path | None = None,
    ) -> None:
        """Begin in front of layer 0; the first arguments are those of `CalibrationEngine.begin`.

        Args:
            spill: folder whose disk keeps the activations.
        """
        self._config = config
        self._options = options
        self._spill = spill
        self._quantized: TokenPath | None = None
        self._exact: TokenPath | None = None
        for batch in rows:
            self._quantized = self._added(self._quantized, _start(config, batch, exact=False))
            if batch.exact is not None:
                self._exact = self._added(self._exact, _start(config, batch, exact=True))

    def add(self, quantized: Batch, exact: Batch | None) -> None:
        """One batch more, in front of the layer that comes first.

        Args:
            exact: the same sequences on the floating-point path, where it is followed.
        """
        self._quantized = self._added(self._quantized, quantized)
        if exact is not None:
            self._exact = self._added(self._exact, exact)

    def _added(self, path: TokenPath | None, batch: Batch) -> TokenPath:
        """The path with one batch more; the first one is the largest."""
        if path is None:
            tokens, folder = batch.hidden.shape[0] * batch.hidden.shape[1], self._spill
            size = tokens * token_bytes(self._config)
            kept: list[Batch] = []
            path = TokenPath(
                self._config, kept if folder is None else SpilledActivations(folder, size)
            )
        path.add(batch)
        return path

    def quantize_layer(
        self,
        layer: int,
        weights: MutableMapping[str, Array],
        quantize: QuantizeStage,
        experts: ExpertWork | None = None,
    ) -> None:
        """Quantize a layer stage by stage, and move the tokens behind it.

        Args:
            weights: role -> float32 weight or gain. What no later stage needs is taken out.
            quantize: called once per stage.
            experts: of models that have some.
        """
        mixed = dict(weights)
        for stage in STAGES:
            self._go(stage, layer, mixed, weights)
            roles = [role for role in stage.roles if role in weights]
            mixed |= quantize(roles, self._statistics(stage, weights))
        if experts is not None:
            exact = () if self._exact is None else self._exact.batches
            sizes = self._options.work
            calibrate_experts(self._config, weights, self._path.batches, exact, experts, sizes)
        self._go(EXIT, layer, mixed, weights)

    def pass_layer(
        self, layer: int, exact: MutableMapping[str, Array], quantized: MutableMapping[str, Array]
    ) -> None:
        """Move the tokens behind a layer that was quantized earlier. The weights are used up.

        Args:
            exact: of the checkpoint; empty when the floating-point path is left out.
            quantized: role -> dequantized weight, or gain; of an expert under role and number.
        """
        for stage in (*STAGES, EXIT):
            self._go(stage, layer, quantized, exact)

    def _go(
        self,
        stage: Stage,
        layer: int,
        quantized: MutableMapping[str, Array],
        exact: MutableMapping[str, Array],
    ) -> None:
        """Move both paths to the input of a stage; the linears on the way are used up."""
        self._path.go(stage, layer, quantized)
        if self._exact is not None:
            self._exact.go(stage, layer, exact)
        for role in PASSED[stage.roles]:
            quantized.pop(role, None)
            exact.pop(role, None)

    @property
    def _path(self) -> TokenPath:
        assert self._quantized is not None, "no batch of tokens"
        return self._quantized

    def _statistics(self, stage: Stage, weights: Weights) -> Statistics:
        """Of the stage's input; `weights` are the checkpoint's."""
        if stage.norm is None:
            return statistics(
                (Inputs(flat(q.x), None if e is None else flat(e.x)) for q, e in self._pairs()),
                self._options.work,
            )
        weight = weights[stage.roles[0]]
        sizes = list(self._output_sizes(weight))
        counts: Sequence[Array | None] = [None] * len(sizes)
        if self._config.post_norms:
            counts = token_weights(sizes, self._options.clip)
        norm = BESIDE_EXPERTS.get(stage.norm, stage.norm) if self._config.experts else stage.norm
        gain = weights[norm] if self._config.post_norms else None
        inputs = (
            Inputs(
                flat(quantized.x),
                weight=count,
                wanted=None if exact is None else self._wanted(exact, quantized, size, gain),
            )
            for (quantized, exact), size, count in zip(self._pairs(), sizes, counts, strict=True)
        )
        found = statistics(inputs, self._options.work)
        if found.wanted is not None:
            # sum (W x_float - W x) x^T = sum (W x_float) x^T - W H
            for rows in row_blocks(weight.shape, self._options.work.row_numbers):
                part = weight[rows].astype(found.hessian.dtype)
                found.wanted[rows] -= self._options.correction * (part @ found.hessian)
        return found

    def _output_sizes(self, weight: Array) -> Iterator[Array]:
        """(tokens, 1) per batch: mean square of each token's output, as the norm behind it takes
        it, of a linear that writes to the residual stream.

        On the floating-point path where it is followed, which keeps the outputs.
        """
        path = self._path if self._exact is None else self._exact
        for index, batch in enumerate(path.batches):
            out = linear(batch.x, weight)
            if self._exact is not None:
                path.batches[index] = replace(batch, out=out)
            yield mean_square(flat(out)) + np.float32(self._config.rms_norm_eps)

    def _wanted(self, exact: Batch, quantized: Batch, size: Array, gain: Array | None) -> Array:
        """(tokens, hidden): what the outputs should be, in part, and add besides."""
        assert exact.out is not None
        lost = flat(exact.hidden - quantized.hidden)
        if gain is not None:
            lost = undo_norm(lost, size, gain)
        correction = np.float32(self._options.correction)
        return correction * flat(exact.out) + np.float32(self._options.residual) * lost

    def _pairs(self) -> Iterator[tuple[Batch, Batch | None]]:
        """Batches of the quantized path, each with its double on the floating-point path."""
        if self._exact is None:
            return zip(self._path.batches, repeat(None))
        return zip(self._path.batches, self._exact.batches, strict=True)


@dataclass(frozen=True)
class NumpyEngine:
    """Calibrates in main memory, its products by BLAS.

    Attributes:
        spill: folder whose disk keeps the activations of the tokens; None keeps them in memory,
            too. The bytes of the bundle are the same.
    """

    spill: Path | None = None

    @property
    def name(self) -> str:
        return ""

    @property
    def elsewhere(self) -> bool:
        return False

    def begin(
        self, config: GemmaConfig, rows: Iterable[TokenRows], options: GptqOptions
    ) -> Calibration:
        return Calibration(config, rows, options, self.spill)


def token_bytes(config: GemmaConfig) -> int:
    """Float32 bytes of a token on one path, at the stage that has most: stream, input, output."""
    widest = max(
        cols
        for layer in range(config.num_layers)
        for _, cols in config.linear_shapes(layer).values()
    )
    streams = config.altup.streams if config.altup else 0
    return 4 * ((2 + streams) * config.hidden_size + widest)
