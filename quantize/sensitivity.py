"""What each tensor's grid costs: the KL divergence of the whole model, tensor by tensor.

Every tensor in turn is rounded on a probe grid, the rest of the model stays as it is, and the
divergence from the untouched model is taken at the output. All these models walk through the layers
together, so the checkpoint is read once. What another grid, and GPTQ instead of plain rounding,
would cost follows from the output errors of the tensor itself, to which the divergence of a small
error is proportional.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from uq.formats.checkpoint import Checkpoint
from uq.formats.config import PER_LAYER_PROJECTION, GemmaConfig, layer_tensor
from uq.formats.spec import Spec
from uq.kernels.weights import CheckpointWeights, Weights
from uq.progress import Progress
from uq.quantize.calibrate import PLAIN, Calibration
from uq.quantize.calibration_engine import ExpertWork, StageStatistics
from uq.quantize.candidates import candidates
from uq.quantize.equalize import channel_scale
from uq.quantize.factor import left_variances
from uq.quantize.gptq import Statistics, scale_importance
from uq.quantize.plan import GptqOptions
from uq.quantize.probes import (
    LEAST,
    PROBE_LENGTH,
    PROBE_WINDOWS,
    TABLE_PROBE,
    Doubles,
    Probes,
    probe,
    probe_spec,
    probed_roles,
    table_names,
)
from uq.quantize.scales import quantize_rtn, squared_error
from uq.quantize.token_rows import exact_rows

Array = NDArray[np.float32]
Costs = Mapping[str, Mapping[Spec, float]]  # tensor -> grid -> mean KL divergence, nats per token

MOMENT_WINDOWS, MOMENT_LENGTH = 16, 256
MOST_WEIGHT = 10  # of a window of the probes, in units of the median one's
# Of the Hessian, in units of its mean diagonal. GPTQ adds more, for texts unlike the calibration;
# here that would count as error what hardly any input shows.
DAMPING = 0.05
SAMPLE_ROWS = 128  # of a linear, on which its grids are compared
# Rows on which the grids of a table are compared, and weights, in the table that has long rows.
TABLE_SAMPLE, TABLE_WEIGHTS = 16384, 1 << 26
SAMPLE_EXPERTS = 8  # of a layer, whose grids stand for those of all


@dataclass(frozen=True)
class Measured:
    """What rounding tensors costs, each alone, in nats per token.

    Attributes:
        costs: of every grid in `CANDIDATES` whose group divides the tensor's columns; the windows
            of the text have about the same say in it, see `balance`.
        plain: of rounding to the nearest of 4 bits, also of tensors that are never quantized.
    """

    costs: Costs
    plain: Mapping[str, float]


@np.errstate(over="ignore", invalid="ignore")
def measure_costs(
    checkpoint: Checkpoint,
    tokens: NDArray[np.int32],
    options: GptqOptions,
    *,
    tables: bool,
    progress: Progress,
) -> Measured:
    """The costs of a model's tensors; an expert stack is one of them.

    Args:
        tokens: (sequences, length) int32 of the calibration; a few of them are used.
        tables: the embedding and an untied head, too, rounded to nearest.

    Where outputs overflow there is no divergence, and the tensors' own errors decide.
    """
    config = checkpoint.config
    source = CheckpointWeights(checkpoint, resident=False)
    sampled = _spread(tokens, MOMENT_WINDOWS)[:, :MOMENT_LENGTH]
    rows = exact_rows(checkpoint, source, sampled)
    moments = Calibration(config, [rows], replace(PLAIN, work=options.work))
    windows = _spread(tokens, PROBE_WINDOWS)[:, :PROBE_LENGTH]
    probes = Probes(config, source, windows, tables=tables)
    errors: dict[str, dict[Spec, float]] = {}
    progress.start(config.num_layers, "measure")
    for layer in range(config.num_layers):
        weights = checkpoint.layer(layer)
        errors |= _layer_errors(checkpoint, layer, weights, moments, options)
        probes.walk(layer, weights, checkpoint)
        progress.advance(f"layer {layer}")
    if tables:
        errors |= {name: _table_errors(checkpoint, name) for name in table_names(config)}
    divergences = probes.divergences()
    progress.close()
    if not all(np.isfinite(windows).all() for windows in divergences.values()):
        progress.note("outputs of the calibration are not finite: grids by the weights' errors")
        divergences = {name: np.ones(1) for name in divergences}
    means = {name: float(found.mean()) for name, found in divergences.items()}
    balanced = balance(divergences)
    costs = {
        name: {spec: balanced[name] * ratio for spec, ratio in ratios.items()}
        for name, ratios in errors.items()
    }
    plain = _in_layers(config, means)
    plain |= {name: means[name] * _plain(errors[name]) for name in set(costs) - set(plain)}
    return Measured(costs, plain)


def balance(divergences: Mapping[str, Doubles]) -> dict[str, float]:
    """Mean over the windows, each weighed by the inverse of what rounding costs there.

    A plain mean is that of the few windows where rounding costs most: its grids suit those alone.

    Args:
        divergences: tensor -> (windows,), of the same windows.
    """
    size = np.mean(list(divergences.values()), axis=0)  # (windows,)
    weights = 1 / np.maximum(size, max(np.median(size) / MOST_WEIGHT, LEAST))
    weights /= weights.sum()
    return {name: float(found @ weights) for name, found in divergences.items()}


def _plain(ratios: Mapping[Spec, float]) -> float:
    """Of a table, which is rounded to the nearest on every grid: on the probe's, with 4 bits."""
    groups = [spec.group for spec in ratios if spec.bits == 4 and not spec.zero_point]
    return ratios[Spec(4, groups[len(groups) // 2], scale_bits=8)]


def _in_layers(config: GemmaConfig, divergences: Mapping[str, float]) -> dict[str, float]:
    """Tensor of a layer -> divergence; the parts of the one that all layers share are added up."""
    found: dict[str, float] = {}
    for layer in range(config.num_layers):
        for role in probed_roles(config, layer):
            whole = role == PER_LAYER_PROJECTION
            name = f"{role}.weight" if whole else layer_tensor(layer, role)
            found[name] = found.get(name, 0.0) + divergences[layer_tensor(layer, role)]
    return found


def _layer_errors(
    checkpoint: Checkpoint,
    layer: int,
    weights: Weights,
    moments: Calibration,
    options: GptqOptions,
) -> dict[str, dict[Spec, float]]:
    """Output error of GPTQ on each grid over that of the probe; takes the tokens a layer on."""
    config, found = checkpoint.config, dict[str, dict[Spec, float]]()

    def stage(roles: Sequence[str], statistics: Statistics) -> dict[str, Array]:
        scale = np.ones_like(statistics.importance)
        if config.norm_before(roles[0]) is not None:
            scale = channel_scale(statistics.importance, options.equalize)
        names = [layer_tensor(layer, role) for role in roles]
        samples = [_sample(weights[role]) for role in roles]
        bases = [_probe_error(*pair, statistics) for pair in zip(names, samples, strict=True)]
        moved = statistics.rescaled(scale)
        left = left_variances(moved.hessian, DAMPING)
        for name, sample, base in zip(names, samples, bases, strict=True):
            errors = _gptq_errors(sample * scale, moved, left)
            found[name] = {spec: e / base for spec, e in errors.items()}
        return {}

    stacks = {
        role: StackErrors(layer_tensor(layer, role), config.experts.count)
        for role in config.expert_roles(layer)
        if config.experts
    }
    read = partial(checkpoint.expert, layer)

    def expert(role: str, number: int, tokens: int, seen: StageStatistics | None) -> Array:
        weight = read(role, number)
        stacks[role].add(number, weight, seen)
        return weight

    moments.quantize_layer(
        layer, dict(weights), stage, ExpertWork(read, expert) if stacks else None
    )
    return found | {stack.name: stack.ratios() for stack in stacks.values()}


class StackErrors:
    """Output errors of a stack of experts: of a few that tokens chose, which stand for all."""

    def __init__(self, name: str, count: int) -> None:
        self.name = name
        self._each = max(1, count // SAMPLE_EXPERTS)
        self._next = 0  # expert from which on one more is looked at
        self._base, self._errors = 0.0, dict[Spec, float]()

    def add(self, number: int, weight: Array, seen: StageStatistics | None) -> None:
        """The next expert; `seen` are the inputs of those tokens that chose it."""
        if number < self._next or not isinstance(seen, Statistics):
            return
        self._next = number - number % self._each + self._each
        sample = _sample(weight)
        self._base += _probe_error(self.name, sample, seen)
        left = left_variances(seen.hessian, DAMPING)
        for spec, error in _gptq_errors(sample, seen, left).items():
            self._errors[spec] = self._errors.get(spec, 0.0) + error

    def ratios(self) -> dict[Spec, float]:
        """Error on each grid over that of the probe."""
        return {spec: error / self._base for spec, error in self._errors.items()}


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
    vocab, cols = checkpoint.config.table_shapes()[name]
    rows = checkpoint.rows(name, 0, min(vocab, TABLE_SAMPLE, TABLE_WEIGHTS // cols))

    def error(spec: Spec) -> float:
        return float(squared_error(rows, quantize_rtn(rows, spec))[0])

    base = max(error(probe_spec(TABLE_PROBE, cols)), 1e-30)
    return {spec: error(spec) / base for spec in candidates(cols)}


def _spread(tokens: NDArray[np.int32], count: int) -> NDArray[np.int32]:
    """`count` sequences, evenly over all; all of them when there are fewer."""
    places = np.linspace(0, len(tokens) - 1, min(count, len(tokens))).astype(np.int64)
    return tokens[places]
