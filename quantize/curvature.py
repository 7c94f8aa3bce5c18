"""How the model's loss bends with the outputs of each linear: the mean of g g^T over the tokens.

g is the gradient of the model's own cross-entropy, for a token drawn from its prediction, at a
linear's output: the mean is a block of the Fisher information, the Hessian of the KL divergence
from the model itself. Together with the moments of the inputs it says what a rounding error costs
(Tseng et al., "Model-Preserving Adaptive Rounding", 2025; Martens and Grosse, "Optimizing Neural
Networks with Kronecker-factored Approximate Curvature", 2015).

The tokens go once through the floating-point layers, and their gradients once back. In memory are
one layer, what happens to one batch in it, what its outputs sum up to, and the residual stream of
all tokens or the gradients that take its place. The streams in front of the other layers and the
sums of those behind wait on the disk.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from uq.formats.checkpoint import Checkpoint
from uq.formats.config import GemmaConfig, layer_tensor
from uq.kernels.per_layer import Beside
from uq.kernels.products import flat, linear
from uq.kernels.reference import embed, soft_cap
from uq.kernels.weights import CheckpointWeights
from uq.progress import Progress
from uq.quantize.backward import LayerGradient, Slope
from uq.quantize.expert_backward import pass_back
from uq.quantize.gptq import output_blocks
from uq.quantize.moments import mean_square
from uq.quantize.paths import Path as Walk
from uq.quantize.paths import pass_layer
from uq.quantize.plan import WorkSizes
from uq.quantize.probes import likeliest
from uq.quantize.pullbacks import Pullback, norm
from uq.quantize.spool import Spool
from uq.quantize.stream_pullbacks import gathered
from uq.quantize.token_rows import exact_rows

Array = NDArray[np.float32]

EVERY = 2  # sequence of the calibration is used
VOCABULARY = 16384  # likeliest tokens, among which the loss is taken: nearly all of the probability
STATES = 256  # positions that choose them
POSITIONS = 512  # whose logits are in memory at once
CERTAIN = np.float32(1e-12)  # smaller probabilities are 0: products of gradients would underflow
CLIP = np.float32(math.sqrt(10))  # of a gradient, in units of the median token's
# Inputs of these are weighed by the inverse of the output's mean square; gradients the other way.
NORMED = ("self_attn.o_proj", "mlp.down_proj")


@dataclass(frozen=True)
class Curvature:
    """What `measure_curvature` found, on the disk."""

    spool: Spool

    def blocks(self, name: str, shape: tuple[int, ...], numbers: int) -> list[Array] | None:
        """Of a linear's rows, one (rows, rows) matrix for each of `output_blocks`; the mean of all
        their diagonals is 1. None where gradients were zero or not finite.
        """
        keys = [(name, rows.start) for rows in output_blocks(shape, numbers)]
        return [self.spool[key] for key in keys] if keys[0] in self.spool else None


def curvature_bytes(config: GemmaConfig, tokens: int, numbers: int) -> int:
    """What waits on the disk: matrices, and the residual stream in front of every layer."""
    found = 0
    for layer in range(config.num_layers):
        found += 4 * (tokens // EVERY) * stream_size(config)
        for shape in coupled_shapes(config, layer).values():
            sizes = (len(range(shape[0])[rows]) for rows in output_blocks(shape, numbers))
            found += 4 * sum(size**2 for size in sizes)
    return found


def coupled_shapes(config: GemmaConfig, layer: int) -> dict[str, tuple[int, int]]:
    """Role -> shape of the linears whose outputs are taken together: of a layer, not of experts."""
    experts = config.expert_roles(layer)
    shapes = config.linear_shapes(layer)
    return {role: shape for role, shape in shapes.items() if role not in experts}


def stream_size(config: GemmaConfig) -> int:
    """Channels of a token's residual stream, or streams."""
    return config.hidden_size * (config.altup.streams if config.altup else 1)


@np.errstate(over="ignore", invalid="ignore", divide="ignore")
def measure_curvature(
    checkpoint: Checkpoint,
    tokens: NDArray[np.int32],
    work: WorkSizes,
    folder: Path,
    progress: Progress,
) -> Curvature:
    """Of all linears but those of experts.

    Args:
        tokens: (sequences, length) int32 of the calibration.
        folder: on whose disk things wait.

    Raises:
        DeviceError: the disk is full or broken.
    """
    config = checkpoint.config
    source = CheckpointWeights(checkpoint, resident=False)
    used = tokens[::EVERY]
    step = max(1, work.batch_tokens // tokens.shape[1])
    texts = [
        _started(checkpoint, source, used[start : start + step])
        for start in range(0, len(used), step)
    ]
    progress.start(2 * config.num_layers, "gradients")
    streams, found = Spool(folder), Spool(folder)
    for layer in range(config.num_layers):
        for index, text in enumerate(texts):
            streams[layer, index] = text.stream
        pass_layer(config, layer, checkpoint.layer(layer), checkpoint, texts)
        progress.advance(f"layer {layer}")
    slopes = _loss_slopes(config, source, [text.stream for text in texts])
    for layer in reversed(range(config.num_layers)):
        weights, moments = checkpoint.layer(layer), OutputMoments(config, layer, work.row_numbers)
        layers = [
            LayerGradient(config, layer, weights, text.beside, slope, moments.add)
            for text, slope in zip(texts, slopes, strict=True)
        ]
        pass_back(layers, checkpoint, partial(_stream, streams, layer))
        moments.store(found)
        progress.advance(f"layer {layer}, back")
    progress.close()
    return Curvature(found)


class OutputMoments:
    """Sums of g g^T of a layer's linears, by blocks of their rows."""

    def __init__(self, config: GemmaConfig, layer: int, numbers: int) -> None:
        self._config, self._layer = config, layer
        self._sums = {
            role: [
                (rows, np.zeros((len(range(shape[0])[rows]),) * 2, np.float32))
                for rows in output_blocks(shape, numbers)
            ]
            for role, shape in coupled_shapes(config, layer).items()
        }

    def add(self, role: str, out: Array, slope: Array) -> None:
        """Take in the outputs of some tokens and the gradients there, (tokens, rows) each."""
        if self._config.post_norms and role in NORMED:
            slope = slope * np.sqrt(mean_square(out))
        slope = _capped(slope)
        for rows, total in self._sums[role]:
            part = slope[:, rows]
            total += part.T @ part

    def store(self, spool: Spool) -> None:
        """Keep what has a finite mean, in units of it."""
        for role, sums in self._sums.items():
            name = layer_tensor(self._layer, role)
            mean = np.mean(np.concatenate([np.diagonal(total) for _, total in sums]))
            if mean > 0 and all(np.isfinite(total).all() for _, total in sums):
                for rows, total in sums:
                    spool[name, rows.start] = total / mean


def _capped(slope: Array) -> Array:
    """Gradients (tokens, rows), the largest shortened: what one token needs of a row is not what
    all need, and a token that all others look at would count as much as they together.
    """
    sizes = np.sqrt(mean_square(slope))
    most = np.median(sizes) * CLIP
    capped: Array = slope * np.minimum(1, most / np.maximum(sizes, np.float32(1e-30)))
    return capped


def _stream(streams: Spool, layer: int, index: int) -> Array:
    return streams[layer, index]


def _started(checkpoint: Checkpoint, source: CheckpointWeights, tokens: NDArray[np.int32]) -> Walk:
    """Some sequences in front of layer 0."""
    rows = exact_rows(checkpoint, source, tokens)
    hidden = embed(checkpoint.config, rows.quantized)
    if rows.quantized_rows is None:
        return Walk(hidden, Beside())
    streams = None if rows.spread is None else rows.spread(hidden)
    return Walk(hidden, Beside(hidden, rows.quantized_rows, streams))


def _loss_slopes(
    config: GemmaConfig, source: CheckpointWeights, streams: Sequence[Array]
) -> list[Slope]:
    """Gradient of the loss at the residual stream behind the last layer, batch by batch.

    The loss at a position is the cross-entropy of a token drawn from the model's own prediction.
    """
    every = max(1, sum(_positions(batch) for batch in streams) // STATES)
    ends = (_end(config, source, batch)[0] for batch in streams)
    sample = np.concatenate([flat(state)[::every] for state in ends])
    head = source.head_rows(likeliest(config, source, sample, VOCABULARY))  # (tokens, hidden)
    rng = np.random.default_rng(0)
    slopes = []
    for batch in streams:
        state, pull = _end(config, source, batch)
        parts = np.array_split(flat(state), math.ceil(_positions(state) / POSITIONS))
        slope = np.concatenate([_head_slope(config, head, part, rng) for part in parts])
        slopes.append(Slope(pull(slope.reshape(state.shape))))
    return slopes


def _end(config: GemmaConfig, source: CheckpointWeights, stream: Array) -> tuple[Array, Pullback]:
    """What the head takes, and the pullback to the residual stream behind the last layer."""
    gain, eps = source.final_norm, config.rms_norm_eps
    if config.altup is None:
        return norm(stream, gain, eps)
    hidden, in_gathering = gathered(config.altup, source.whole, stream)
    state, in_norm = norm(hidden, gain, eps)
    return state, lambda slope: in_gathering(in_norm(slope))


def _head_slope(config: GemmaConfig, head: Array, states: Array, rng: np.random.Generator) -> Array:
    """Gradient at the states (n, hidden) in front of the head."""
    logits = soft_cap(config, linear(states, head))  # (n, tokens)
    steep = 1 - (logits / config.final_softcap) ** 2 if config.final_softcap else None
    slope = np.exp(logits - logits.max(axis=1, keepdims=True))
    reached = np.cumsum(slope, axis=1, dtype=np.float64)
    drawn = (reached < rng.random((len(slope), 1)) * reached[:, -1:]).sum(axis=1)
    slope /= reached[:, -1:].astype(np.float32)
    slope[np.arange(len(slope)), np.minimum(drawn, len(head) - 1)] -= 1
    slope[np.abs(slope) < CERTAIN] = 0
    if steep is not None:
        slope *= steep
    found: Array = slope @ head
    return found


def _positions(batch: Array) -> int:
    return math.prod(batch.shape[:2])
