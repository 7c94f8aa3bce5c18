"""Copies of the model with one tensor rounded each, walked through the layers beside the untouched.

How far a rounded tensor moves the output is measured for all tensors of up to `PROBED_LAYERS`
layers, spread over the model. For the layers between, the stream behind the layer itself says how
much the rounding adds there, and the probed layers on both sides say what becomes of it behind: so
memory and time per layer stop growing with the number of layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from uq.formats.config import EMBEDDING, HEAD, GemmaConfig, layer_tensor
from uq.formats.spec import SPECS, Spec
from uq.kernels.products import flat, linear, rms_norm
from uq.kernels.reference import embed, layer_forward, soft_cap
from uq.kernels.weights import CheckpointWeights, Weights
from uq.quantize.moments import mean_square
from uq.quantize.scales import checked, quantize_rtn
from uq.validate.divergence import Sums

Array = NDArray[np.float32]

# Grids to choose from. Scales of 8 bits lose nearly nothing; INT8 loses so little that its smallest
# form serves.
CANDIDATES = tuple(
    replace(spec, scale_bits=8)
    for spec in SPECS
    if spec.bits < 6 or (not spec.zero_point and spec.bits == 6)
) + (Spec(8, 64, scale_bits=8),)
LINEAR_PROBE, TABLE_PROBE = 4, 6  # bits: enough for a divergence that stands out of the rounding
PROBED_LAYERS = 18
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
        self._probed = probed_layers(config.num_layers)
        rows = source.embedding(tokens)  # (windows, length, hidden)
        self._exact = embed(config, rows)
        self._models: dict[str, Array] = {}  # tensor -> hidden of the model where it is rounded
        self._moved: dict[str, float] = {}  # tensor of a layer -> what rounding it adds to hidden
        if tables:
            spec = probe_spec(TABLE_PROBE, config.hidden_size)
            rounded = quantize_rtn(flat(rows), spec).dequantize().reshape(rows.shape)
            self._models[EMBEDDING] = embed(config, rounded)
            if not config.tied_head:
                self._models[HEAD] = self._exact

    def walk(self, layer: int, weights: Weights) -> None:
        """Take all models through a layer, and start those of its own linears."""
        started = {}
        for role in self._config.linear_shapes(layer):
            name = layer_tensor(layer, role)
            rounded = {**weights, role: probe(name, weights[role])}
            started[name] = layer_forward(self._config, layer, rounded, self._exact)
        self._exact = layer_forward(self._config, layer, weights, self._exact)
        names = list(self._models)
        step = max(1, TOKEN_BLOCK // self._exact[..., 0].size)
        for first in range(0, len(names), step):
            here = names[first : first + step]
            batch = np.concatenate([self._models[name] for name in here])
            moved = layer_forward(self._config, layer, weights, batch)
            parts = moved.reshape(len(here), *self._exact.shape)
            self._models |= zip(here, map(np.copy, parts), strict=True)
        self._moved |= {name: relative_error(self._exact, h) for name, h in started.items()}
        if layer in self._probed:
            self._models |= started

    def divergences(self) -> dict[str, float]:
        """Mean KL divergence from the untouched model of each with one tensor rounded; once."""
        measured = dict(zip(self._models, self._measured(), strict=True))
        for role in self._config.linear_shapes(0):
            probed = [layer_tensor(layer, role) for layer in self._probed]
            effects = [
                np.log(max(measured[name], LEAST) / max(self._moved[name], LEAST))
                for name in probed
            ]
            for layer in range(self._config.num_layers):
                name = layer_tensor(layer, role)
                effect = float(np.exp(np.interp(layer, self._probed, effects)))
                measured.setdefault(name, self._moved[name] * effect)
        return measured

    def _measured(self) -> Iterator[float]:
        """Divergence of each model among the likeliest tokens; the models are used up."""
        states = np.stack([self._last(self._exact), *map(self._last, self._models.values())])
        names = list(self._models)
        self._models = {}
        unused = np.zeros(states.shape[1], np.int32)
        sums = [Sums(unused) for _ in names]
        kept = self._likeliest(states[0])
        for start in range(0, len(kept), VOCAB_BLOCK):
            head = self._source.head_rows(kept[start : start + VOCAB_BLOCK])
            reference, *logits = soft_cap(self._config, linear(states, head))
            for name, total, model, state in zip(names, sums, logits, states[1:], strict=True):
                total.add(reference, self._table_logits(name, head, state, model), start)
        return (float(total.scores().kld.mean()) for total in sums)

    def _last(self, hidden: Array) -> Array:
        """(n, hidden) in front of the head, at the positions that count."""
        counted = np.ascontiguousarray(hidden[:, POSITIONS])
        return flat(rms_norm(counted, self._source.final_norm, self._config.rms_norm_eps))

    def _likeliest(self, states: Array) -> NDArray[np.intp]:
        """Ids, rising, of the tokens with the largest sum of probabilities; states (n, hidden).

        Twice over the vocabulary, a block at a time: what normalizes, then the probabilities.
        """
        most = np.full((len(states), 1), -np.inf, np.float32)
        mass = np.zeros((len(states), 1))
        for logits in self._logits(states):
            peak = np.maximum(most, logits.max(axis=1, keepdims=True))
            mass = mass * np.exp(most - peak) + np.exp(logits - peak).sum(axis=1, keepdims=True)
            most = peak
        blocks = [(np.exp(logits - most) / mass).sum(axis=0) for logits in self._logits(states)]
        return np.sort(np.argsort(-np.concatenate(blocks), kind="stable")[:LIKELIEST])

    def _logits(self, states: Array) -> Iterator[Array]:
        """(n, TOKEN_BLOCK or fewer) for one block of the vocabulary after the other."""
        vocab = self._config.vocab_size
        for start in range(0, vocab, TOKEN_BLOCK):
            head = self._source.head(start, min(start + TOKEN_BLOCK, vocab))
            yield soft_cap(self._config, linear(states, head))

    def _table_logits(self, name: str, head: Array, states: Array, logits: Array) -> Array:
        """`logits`, or those of the rounded head where that is the probed tensor."""
        if name != table_names(self._config)[-1]:
            return logits
        rounded = quantize_rtn(head, probe_spec(TABLE_PROBE, head.shape[1])).dequantize()
        return soft_cap(self._config, linear(states, rounded))


def table_names(config: GemmaConfig) -> tuple[str, ...]:
    return (EMBEDDING,) if config.tied_head else (EMBEDDING, HEAD)


def candidates(cols: int) -> list[Spec]:
    """Grids that fit the columns of a tensor."""
    return [spec for spec in CANDIDATES if cols % spec.group == 0]


def probe_spec(bits: int, cols: int) -> Spec:
    """The probe grid: the middle one of the groups that fit."""
    groups = [spec.group for spec in candidates(cols) if spec.bits == 4 and not spec.zero_point]
    return Spec(bits, groups[len(groups) // 2])


def probe(name: str, weight: Array) -> Array:
    """A linear on its probe grid; one that no grid holds is refused here, before any work."""
    return checked(
        name, quantize_rtn(weight, probe_spec(LINEAR_PROBE, weight.shape[1]))
    ).dequantize()


def probed_layers(layers: int) -> Sequence[int]:
    """All of them, or `PROBED_LAYERS` from the first to the last."""
    return list(map(int, np.linspace(0, layers - 1, min(layers, PROBED_LAYERS)).round()))


def relative_error(exact: Array, moved: Array) -> float:
    """Mean over the tokens of |moved - exact|^2 / |exact|^2, (..., hidden) each."""
    lost, energy = mean_square(flat(moved - exact)), mean_square(flat(exact))
    return float(np.mean(lost / np.maximum(energy, LEAST)))
