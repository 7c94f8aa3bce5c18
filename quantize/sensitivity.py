"""What each tensor's grid costs: the KL divergence of the whole model, tensor by tensor.

Every tensor in turn is rounded on a probe grid, the rest of the model stays as it is, and the
divergence from the untouched model is taken at the output. All these models walk through the layers
together, so the checkpoint is read once. What another grid, and GPTQ instead of plain rounding,
would cost follows from the output errors of the tensor itself, to which the divergence of a small
error is proportional.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from uq.formats.checkpoint import Checkpoint
from uq.formats.config import EMBEDDING, HEAD, GemmaConfig, layer_tensor
from uq.formats.spec import SPECS, Spec
from uq.kernels.reference import (
    embed,
    flat,
    layer_forward,
    linear,
    rms_norm,
    soft_cap,
)
from uq.kernels.weights import CheckpointWeights, Weights
from uq.progress import Progress
from uq.quantize.calibrate import Calibration
from uq.quantize.calibration_engine import TokenRows
from uq.quantize.equalize import channel_scale
from uq.quantize.factor import left_variances
from uq.quantize.gptq import Statistics, scale_importance
from uq.quantize.plan import GptqOptions
from uq.quantize.scales import checked, quantize_rtn, squared_error
from uq.validate.divergence import Sums

Array = NDArray[np.float32]
Costs = Mapping[str, Mapping[Spec, float]]  # tensor -> grid -> mean KL divergence, nats per token

# Grids to choose from. INT8 loses so little that its smallest form serves.
CANDIDATES = tuple(
    spec for spec in SPECS if spec.bits < 6 or (not spec.zero_point and spec.bits == 6)
) + (Spec(8, 64),)
LINEAR_PROBE, TABLE_PROBE = 4, 6  # bits: enough for a divergence that stands out of the rounding
PROBE_WINDOWS, PROBE_LENGTH = 12, 32  # many short ones: texts differ more than positions
POSITIONS = slice(12, None)  # of a window, where the divergence is taken
LIKELIEST = 8192  # tokens of the vocabulary on which it is taken: nearly all of the probability
MOMENT_WINDOWS, MOMENT_LENGTH = 16, 256
SAMPLE_ROWS = 128  # of a linear, on which its grids are compared
TOKEN_BLOCK = 4096
VOCAB_BLOCK = 1024
TABLE_SAMPLE = 16384  # rows on which the grids of the embedding are compared


@np.errstate(over="ignore", invalid="ignore")
def measure_costs(
    checkpoint: Checkpoint,
    tokens: NDArray[np.int32],
    options: GptqOptions,
    *,
    tables: bool,
    progress: Progress,
) -> Costs:
    """Cost of every grid in `CANDIDATES` whose group divides the tensor's columns.

    Args:
        tokens: (sequences, length) int32 of the calibration; a few of them are used.
        tables: the embedding and an untied head, too, rounded to nearest.

    Where outputs overflow there is no divergence, and the tensors' own errors decide.
    """
    config = checkpoint.config
    source = CheckpointWeights(checkpoint, resident=False)
    sampled = _spread(tokens, MOMENT_WINDOWS)[:, :MOMENT_LENGTH]
    moments = Calibration(config, [TokenRows(source.embedding(sampled))])
    windows = _spread(tokens, PROBE_WINDOWS)[:, :PROBE_LENGTH]
    probes = Probes(config, source, windows, tables=tables)
    errors: dict[str, dict[Spec, float]] = {}
    progress.start(config.num_layers, "measure")
    for layer in range(config.num_layers):
        weights = checkpoint.layer(layer)
        errors |= _layer_errors(config, layer, weights, moments, options)
        probes.walk(layer, weights)
        progress.advance(f"layer {layer}")
    if tables:
        errors |= {name: _table_errors(checkpoint, name) for name in table_names(config)}
    divergences = probes.divergences()
    progress.close()
    if not all(map(math.isfinite, divergences.values())):
        progress.note("outputs of the calibration are not finite: grids by the weights' errors")
        divergences = dict.fromkeys(divergences, 1.0)
    return {
        name: {spec: divergences[name] * ratio for spec, ratio in ratios.items()}
        for name, ratios in errors.items()
    }


def table_names(config: GemmaConfig) -> tuple[str, ...]:
    return (EMBEDDING,) if config.tied_head else (EMBEDDING, HEAD)


def candidates(cols: int) -> list[Spec]:
    """Grids that fit the columns of a tensor."""
    return [spec for spec in CANDIDATES if cols % spec.group == 0]


def probe_spec(bits: int, cols: int) -> Spec:
    """The probe grid: the middle one of the groups that fit."""
    groups = [spec.group for spec in candidates(cols) if spec.bits == 4 and not spec.zero_point]
    return Spec(bits, groups[len(groups) // 2])


class Probes:
    """The untouched model and one model per probed tensor, on their way through the layers."""

    def __init__(
        self,
        config: GemmaConfig,
        source: CheckpointWeights,
        tokens: NDArray[np.int32],
        *,
        tables: bool,
    ) -> None:
        """`tokens` are (windows, length) int32."""
        self._config = config
        self._source = source
        rows = source.embedding(tokens)  # (windows, length, hidden)
        self._names: list[str] = []
        self._hidden = embed(config, rows)[None]  # (1 + models, windows, length, hidden)
        if tables:
            spec = probe_spec(TABLE_PROBE, config.hidden_size)
            rounded = quantize_rtn(flat(rows), spec).dequantize().reshape(rows.shape)
            self._add([EMBEDDING], [embed(config, rounded)])
            if not config.tied_head:
                self._add([HEAD], [self._hidden[0]])

    def walk(self, layer: int, weights: Weights) -> None:
        """Take all models through a layer, and start those of its own linears."""
        names, states = [], []
        for role in self._config.linear_shapes():
            names.append(layer_tensor(layer, role))
            probed = {**weights, role: _probe(names[-1], weights[role])}
            states.append(layer_forward(self._config, layer, probed, self._hidden[0]))
        step = max(1, TOKEN_BLOCK // self._hidden[0, ..., 0].size)
        for first in range(0, len(self._hidden), step):
            block = self._hidden[first : first + step]
            batch = block.reshape(-1, *block.shape[2:])
            moved = layer_forward(self._config, layer, weights, batch)
            self._hidden[first : first + step] = moved.reshape(block.shape)
        self._add(names, states)

    def divergences(self) -> dict[str, float]:
        """Mean KL divergence of each model from the untouched one, among the likeliest tokens."""
        hidden = self._hidden[:, :, POSITIONS]  # (1 + models, windows, positions, hidden)
        last = rms_norm(hidden, self._source.final_norm, self._config.rms_norm_eps)
        states = last.reshape(len(last), -1, last.shape[-1])  # (1 + models, n, hidden)
        unused = np.zeros(states.shape[1], np.int32)
        sums = [Sums(unused) for _ in self._names]
        kept = self._likeliest(states[0])
        for start in range(0, len(kept), VOCAB_BLOCK):
            head = self._source.head_rows(kept[start : start + VOCAB_BLOCK])
            reference, *logits = soft_cap(self._config, linear(states, head))
            for name, total, model, state in zip(
                self._names, sums, logits, states[1:], strict=True
            ):
                total.add(reference, self._table_logits(name, head, state, model), start)
        return {
            name: float(total.scores().kld.mean())
            for name, total in zip(self._names, sums, strict=True)
        }

    def _likeliest(self, states: Array) -> NDArray[np.intp]:
        """Ids, rising, of the tokens with the largest sum of probabilities; states (n, hidden)."""
        vocab = self._config.vocab_size
        starts = range(0, vocab, TOKEN_BLOCK)
        heads = (self._source.head(start, min(start + TOKEN_BLOCK, vocab)) for start in starts)
        blocks = [soft_cap(self._config, linear(states, head)) for head in heads]
        logits = np.concatenate(blocks, axis=1)  # (n, vocab)
        logits -= logits.max(axis=1, keepdims=True)
        masses = np.exp(logits, out=logits)
        total = (masses / masses.sum(axis=1, keepdims=True)).sum(axis=0)
        return np.sort(np.argsort(-total, kind="stable")[:LIKELIEST])

    def _table_logits(self, name: str, head: Array, states: Array, logits: Array) -> Array:
        """`logits`, or those of the rounded head where that is the probed tensor."""
        if name != table_names(self._config)[-1]:
            return logits
        rounded = quantize_rtn(head, probe_spec(TABLE_PROBE, head.shape[1])).dequantize()
        return soft_cap(self._config, linear(states, rounded))

    def _add(self, names: Sequence[str], states: Sequence[Array]) -> None:
        self._names += names
        self._hidden = np.concatenate([self._hidden, np.stack(states)])


def _layer_errors(
    config: GemmaConfig,
    layer: int,
    weights: Weights,
    moments: Calibration,
    options: GptqOptions,
) -> dict[str, dict[Spec, float]]:
    """Output error of GPTQ on each grid over that of the probe; takes the tokens a layer on."""
    found: dict[str, dict[Spec, float]] = {}

    def stage(roles: Sequence[str], statistics: Statistics) -> dict[str, Array]:
        scale = np.ones_like(statistics.importance)
        if config.norm_before(roles[0]) is not None:
            scale = channel_scale(statistics.importance, options.equalize)
        names = [layer_tensor(layer, role) for role in roles]
        samples = [_sample(weights[role]) for role in roles]
        bases = [_probe_error(*pair, statistics) for pair in zip(names, samples, strict=True)]
        moved = statistics.rescaled(scale)
        left = left_variances(moved.hessian, options.damping)
        for name, sample, base in zip(names, samples, bases, strict=True):
            errors = _gptq_errors(sample * scale, moved, left)
            found[name] = {spec: e / base for spec, e in errors.items()}
        return {}

    moments.quantize_layer(layer, dict(weights), stage)
    return found


def _sample(weight: Array) -> Array:
    """Rows spread over a tensor, about `SAMPLE_ROWS` of them."""
    return weight[:: max(1, len(weight) // SAMPLE_ROWS)]


def _probe(name: str, weight: Array) -> Array:
    """A linear on its probe grid; one that no grid holds is refused here, before any work."""
    return checked(
        name, quantize_rtn(weight, probe_spec(LINEAR_PROBE, weight.shape[1]))
    ).dequantize()


def _probe_error(name: str, weight: Array, statistics: Statistics) -> float:
    """Squared output error of the probe grid, whose divergence is known."""
    error = weight.astype(statistics.hessian.dtype) - _probe(name, weight)
    if not np.isfinite(statistics.hessian).all():
        return max(float(np.sum(error**2)), 1e-30)
    return max(float(np.sum((error @ statistics.hessian) * error)), 1e-30)


def _gptq_errors(
    weight: Array, statistics: Statistics, left: NDArray[np.float64] | None
) -> dict[Spec, float]:
    """Squared output error that GPTQ leaves on each grid, without running it.

    A column that GPTQ rounds leaves an error of its variance given the columns still to come,
    `left` (Frantar et al., "GPTQ", section 3.3). By then the errors of earlier columns have moved
    the column off any grid that it lay on, so its rounding error is uniform: scale^2 / 12.
    """
    cols = weight.shape[1]
    weights = np.ones(cols) if left is None else left
    importance = None if left is None else scale_importance(statistics, left)

    def error(spec: Spec) -> float:
        scales = quantize_rtn(weight, spec, importance).scales.astype(np.float64)
        return max(float(np.sum(scales**2 @ weights.reshape(-1, spec.group))) / 12, 1e-30)

    return {spec: error(spec) for spec in candidates(cols)}


def _table_errors(checkpoint: Checkpoint, name: str) -> dict[Spec, float]:
    """Squared rounding error on each grid over that of the probe."""
    vocab, cols = checkpoint.config.vocab_size, checkpoint.config.hidden_size
    rows = checkpoint.rows(name, 0, min(vocab, TABLE_SAMPLE))

    def error(spec: Spec) -> float:
        return float(squared_error(rows, quantize_rtn(rows, spec))[0])

    base = max(error(probe_spec(TABLE_PROBE, cols)), 1e-30)
    return {spec: error(spec) / base for spec in candidates(cols)}


def _spread(tokens: NDArray[np.int32], count: int) -> NDArray[np.int32]:
    """`count` sequences, evenly over all; all of them when there are fewer."""
    places = np.linspace(0, len(tokens) - 1, min(count, len(tokens))).astype(np.int64)
    return tokens[places]
