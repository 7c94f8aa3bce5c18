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
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from uq.formats.checkpoint import Checkpoint
from uq.formats.config import GemmaConfig, layer_tensor
from uq.formats.spec import Spec
from uq.kernels.weights import CheckpointWeights, Weights
from uq.progress import Progress
from uq.quantize.calibrate import PLAIN, Calibration
from uq.quantize.calibration_engine import TokenRows
from uq.quantize.equalize import channel_scale
from uq.quantize.factor import left_variances
from uq.quantize.gptq import Statistics, scale_importance
from uq.quantize.plan import GptqOptions
from uq.quantize.probes import (
    PROBE_LENGTH,
    PROBE_WINDOWS,
    TABLE_PROBE,
    Probes,
    candidates,
    probe,
    probe_spec,
    table_names,
)
from uq.quantize.scales import quantize_rtn, squared_error

Array = NDArray[np.float32]
Costs = Mapping[str, Mapping[Spec, float]]  # tensor -> grid -> mean KL divergence, nats per token

MOMENT_WINDOWS, MOMENT_LENGTH = 16, 256
SAMPLE_ROWS = 128  # of a linear, on which its grids are compared
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
    rows = [TokenRows(source.embedding(sampled))]
    moments = Calibration(config, rows, replace(PLAIN, work=options.work))
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


def _probe_error(name: str, weight: Array, statistics: Statistics) -> float:
    """Squared output error of the probe grid, whose divergence is known."""
    error = weight.astype(statistics.hessian.dtype) - probe(name, weight)
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
