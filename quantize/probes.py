"""Copies of the model with one tensor rounded each, walked through the layers beside the untouched.

How far a rounded tensor moves the output is measured in up to `PROBED_LAYERS` layers for every
role, spread over those that have it, and in `KEPT_LAYERS` for tensors that are never quantized:
those are probed to be told of. For the layers between, the stream behind the layer itself says how
much the rounding adds there, and the probed layers on both sides say what becomes of it behind: so
memory and time per layer stop growing with the number of layers.

All experts of a layer are rounded together: in a bundle they are one tensor with one grid.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from uq.formats.config import (
    EMBEDDING,
    HEAD,
    PER_LAYER_EMBEDDING,
    PER_LAYER_PROJECTION,
    GemmaConfig,
    layer_tensor,
)
from uq.formats.spec import Spec
from uq.kernels.altup import spread
from uq.kernels.per_layer import Beside, stored_tokens
from uq.kernels.products import flat, linear, rms_norm
from uq.kernels.reference import embed, finish, soft_cap
from uq.kernels.weights import CheckpointWeights, Weights
from uq.quantize.candidates import candidates
from uq.quantize.moments import mean_square
from uq.quantize.paths import Experts, Path, pass_layer
from uq.quantize.scales import checked, quantize_rtn
from uq.validate.divergence import Sums

Array = NDArray[np.float32]
Doubles = NDArray[np.float64]

LINEAR_PROBE, TABLE_PROBE = 4, 6  # bits: enough for a divergence that stands out of the rounding
PROBED_LAYERS, KEPT_LAYERS = 18, 4
# What later layers read, where keys and values are shared: no layer between tells of it.
READ_BY_OTHERS = ("self_attn.k_proj", "self_attn.v_proj")
PROBE_WINDOWS, PROBE_LENGTH = 12, 32  # many short ones: texts differ more than positions
POSITIONS = slice(12, None)  # of a window, where the divergence is taken
LIKELIEST = 8192  # tokens of the vocabulary on which it is taken: nearly all of the probability
TOKEN_BLOCK = 4096
VOCAB_BLOCK = 1024
LEAST = 1e-30  # of an error or a divergence


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
        linears = _linear_roles(config)
        self._probed = {
            role: probed_layers(layers, PROBED_LAYERS if role in linears else KEPT_LAYERS)
            for role, layers in _layers_with(config).items()
        }
        for role in READ_BY_OTHERS:
            read = config.shared_sources.intersection(_layers_with(config)[role])
            self._probed[role] = sorted({*self._probed[role], *read})
        self._moved: dict[str, float] = {}  # tensor of a layer -> what rounding it adds to hidden
        rows = source.embedding(tokens)  # (windows, length, hidden)
        told = self._per_layer_rows(tokens)
        self._exact = self._start(rows, told)
        self._models: dict[str, Path] = {}  # tensor -> the model where it is rounded
        if tables:
            self._models[EMBEDDING] = self._start(_on_probe_grid(rows), told)
            if not config.tied_head:
                self._models[HEAD] = self._exact.fork()
            if told is not None:
                self._models[PER_LAYER_EMBEDDING] = self._start(rows, _on_probe_grid(told))

    def _per_layer_rows(self, tokens: NDArray[np.int32]) -> Array | None:
        """(windows, length, layers * size) of the per-layer embedding."""
        if self._config.per_layer is None:
            return None
        return self._source.per_layer_rows(stored_tokens(self._config.per_layer, tokens))

    def _start(self, rows: Array, told: Array | None) -> Path:
        """In front of layer 0."""
        hidden, config = embed(self._config, rows), self._config
        if told is None or config.per_layer is None:
            return Path(hidden, Beside())
        streams = spread(config.altup, self._source.whole, hidden) if config.altup else None
        return Path(hidden, Beside(hidden, partial(_part, told, config.per_layer.size), streams))

    def walk(self, layer: int, weights: Weights, experts: Experts) -> None:
        """Take all models through a layer, and start those of its own tensors."""
        roles = probed_roles(self._config, layer)
        started = {layer_tensor(layer, role): self._exact.fork(role) for role in roles}
        paths = [self._exact, *self._models.values(), *started.values()]
        pass_layer(self._config, layer, weights, experts, paths, partial(_probe_of, layer))
        exact = self._exact.stream
        for role, (name, path) in zip(roles, started.items(), strict=True):
            path.rounded = None
            self._moved[name] = relative_error(exact, path.stream)
            if layer in self._probed[role]:
                self._models[name] = path

    def divergences(self) -> dict[str, Doubles]:
        """(windows,) mean KL divergence from the untouched model of each with one tensor rounded;
        once.
        """
        measured = dict(zip(self._models, self._measured(), strict=True))
        for role, layers in _layers_with(self._config).items():
            probed = self._probed[role]
            effects = np.log([  # (probed, windows)
                np.maximum(measured[name], LEAST) / max(self._moved[name], LEAST)
                for name in (layer_tensor(layer, role) for layer in probed)
            ])  # fmt: skip
            for layer in layers:
                name = layer_tensor(layer, role)
                effect = np.exp([np.interp(layer, probed, window) for window in effects.T])
                measured.setdefault(name, self._moved[name] * effect)
        return measured

    def _measured(self) -> Iterator[Doubles]:
        """Divergence of each model among the likeliest tokens; the models are used up."""
        states = np.stack([self._last(self._exact), *map(self._last, self._models.values())])
        names = list(self._models)
        self._models = {}
        unused = np.zeros(states.shape[1], np.int32)
        sums = [Sums(unused) for _ in names]
        kept = likeliest(self._config, self._source, states[0], LIKELIEST)
        for start in range(0, len(kept), VOCAB_BLOCK):
            head = self._source.head_rows(kept[start : start + VOCAB_BLOCK])
            reference, *logits = soft_cap(self._config, linear(states, head))
            for name, total, model, state in zip(names, sums, logits, states[1:], strict=True):
                total.add(reference, self._table_logits(name, head, state, model), start)
        windows = len(self._exact.hidden)
        return (total.scores().kld.reshape(windows, -1).mean(axis=1) for total in sums)

    def _last(self, path: Path) -> Array:
        """(n, hidden) in front of the head, at the positions that count."""
        hidden = finish(self._config, self._source, path.hidden, path.beside)
        counted = np.ascontiguousarray(hidden[:, POSITIONS])
        return flat(rms_norm(counted, self._source.final_norm, self._config.rms_norm_eps))

    def _table_logits(self, name: str, head: Array, states: Array, logits: Array) -> Array:
        """`logits`, or those of the rounded head where that is the probed tensor."""
        if name != (EMBEDDING if self._config.tied_head else HEAD):
            return logits
        rounded = quantize_rtn(head, probe_spec(TABLE_PROBE, head.shape[1])).dequantize()
        return soft_cap(self._config, linear(states, rounded))


def likeliest(
    config: GemmaConfig, source: CheckpointWeights, states: Array, count: int
) -> NDArray[np.intp]:
    """Ids, rising, of the `count` tokens with the largest sum of probabilities.

    Twice over the vocabulary, a block at a time: what normalizes, then the probabilities.

    Args:
        states: (n, hidden) in front of the head.
    """
    most = np.full((len(states), 1), -np.inf, np.float32)
    mass = np.zeros((len(states), 1))
    for logits in _logits(config, source, states):
        peak = np.maximum(most, logits.max(axis=1, keepdims=True))
        mass = mass * np.exp(most - peak) + np.exp(logits - peak).sum(axis=1, keepdims=True)
        most = peak
    blocks = _logits(config, source, states)
    total = np.concatenate([(np.exp(logits - most) / mass).sum(axis=0) for logits in blocks])
    return np.sort(np.argsort(-total, kind="stable")[:count])


def _logits(config: GemmaConfig, source: CheckpointWeights, states: Array) -> Iterator[Array]:
    """(n, TOKEN_BLOCK or fewer) for one block of the vocabulary after the other."""
    for start in range(0, config.vocab_size, TOKEN_BLOCK):
        head = source.head(start, min(start + TOKEN_BLOCK, config.vocab_size))
        yield soft_cap(config, linear(states, head))


def table_names(config: GemmaConfig) -> tuple[str, ...]:
    return tuple(config.table_shapes())


def probed_roles(config: GemmaConfig, layer: int) -> list[str]:
    """Linears of a layer, and the matrices that are never quantized where a grid fits them."""
    kept = config.kept_shapes(layer)
    if config.per_layer is not None:
        kept[PER_LAYER_PROJECTION] = (config.per_layer.size, config.hidden_size)
    matrices = [role for role, shape in kept.items() if len(shape) == 2 and candidates(shape[1])]
    return [*config.linear_shapes(layer), *matrices]


def probed_models(config: GemmaConfig) -> int:
    """Number of models, each with one tensor of a layer rounded, that reach the output."""
    linears = _linear_roles(config)
    return sum(
        min(len(layers), PROBED_LAYERS if role in linears else KEPT_LAYERS)
        for role, layers in _layers_with(config).items()
    )


def _linear_roles(config: GemmaConfig) -> set[str]:
    return {role for layer in range(config.num_layers) for role in config.linear_shapes(layer)}


def _layers_with(config: GemmaConfig) -> dict[str, list[int]]:
    """Role -> the layers that have it."""
    found: dict[str, list[int]] = {}
    for layer in range(config.num_layers):
        for role in probed_roles(config, layer):
            found.setdefault(role, []).append(layer)
    return found


def _probe_of(layer: int, role: str, weight: Array) -> Array:
    return probe(layer_tensor(layer, role), weight)


def _on_probe_grid(rows: Array) -> Array:
    """Rows of a table, (..., n)."""
    spec = probe_spec(TABLE_PROBE, rows.shape[-1])
    return quantize_rtn(flat(rows), spec).dequantize().reshape(rows.shape)


def _part(told: Array, size: int, layer: int) -> Array:
    """A layer's part of rows of the per-layer embedding."""
    return told[..., layer * size : (layer + 1) * size]


def probe_spec(bits: int, cols: int) -> Spec:
    """The probe grid: the middle one of the groups that fit."""
    groups = [spec.group for spec in candidates(cols) if spec.bits == 4 and not spec.zero_point]
    return Spec(bits, groups[len(groups) // 2])


def probe(name: str, weight: Array) -> Array:
    """A linear on its probe grid; one that no grid holds is refused here, before any work."""
    return checked(
        name, quantize_rtn(weight, probe_spec(LINEAR_PROBE, weight.shape[1]))
    ).dequantize()


def probed_layers(layers: Sequence[int], most: int) -> list[int]:
    """All of them, or so many from the first to the last."""
    places = np.linspace(0, len(layers) - 1, min(len(layers), most)).round()
    return [layers[int(place)] for place in places]


def relative_error(exact: Array, moved: Array) -> float:
    """Mean over the tokens of |moved - exact|^2 / |exact|^2, (..., hidden) each."""
    lost, energy = mean_square(flat(moved - exact)), mean_square(flat(exact))
    return float(np.mean(lost / np.maximum(energy, LEAST)))
