"""Weights of residual streams with alternating updates, and of the product of low rank beside
attention, on the device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from uq.formats.config import (
    ALTUP_PROJECTIONS,
    ALTUP_UNEMBED_PROJECTIONS,
    AltUp,
    GemmaConfig,
    layer_tensor,
)
from uq.formats.manifest import gain_name
from uq.kernels.vulkan.beside import kept_matrix
from uq.kernels.vulkan.memory import Span
from uq.kernels.vulkan.weights import Loader, Matrix, tiles_of

MOST_STREAMS = 8  # their columns lie in registers


@dataclass(frozen=True)
class Laurel:
    """Matrices (rank, hidden) and (hidden, rank), and the gain of the norm behind them."""

    left: Matrix
    right: Matrix
    gain: Span


@dataclass(frozen=True)
class Updates:
    """What a layer does to the streams; all of it float32.

    Attributes:
        router: (streams, hidden), and the gain of the norm in front of it.
        prediction, correction: coefficients by what the router says.
        scale: of the active stream where it meets the per-layer embedding.
    """

    router: Span
    router_gain: Span
    prediction: Span
    correction: Span
    scale: Span


@dataclass(frozen=True)
class Ways:
    """Matrices (hidden, hidden) into the streams behind the first, and out of them."""

    into: tuple[Matrix, ...]
    out: tuple[Matrix, ...]


def load_laurel(config: GemmaConfig, loader: Loader, layer: int) -> Laurel | None:
    if not config.laurel_rank:
        return None
    return Laurel(
        left=kept_matrix(loader, layer_tensor(layer, "laurel.linear_left")),
        right=kept_matrix(loader, layer_tensor(layer, "laurel.linear_right")),
        gain=loader.gain(gain_name(layer_tensor(layer, "laurel.post_laurel_norm"))),
    )


def load_updates(config: GemmaConfig, loader: Loader, layer: int) -> Updates | None:
    if config.altup is None:
        return None

    def kept(role: str) -> Span:
        return loader.gain(layer_tensor(layer, f"altup.{role}"))

    ones = np.ones(config.hidden_size, np.float32)
    return Updates(
        router=kept("modality_router"),
        router_gain=loader.gain(gain_name(layer_tensor(layer, "altup.router_norm"))),
        prediction=kept("prediction_coefs"),
        correction=kept("correction_coefs"),
        scale=kept("correct_output_scale") if config.altup.scaled else loader.put(ones),
    )


def load_ways(config: GemmaConfig, loader: Loader) -> Ways | None:
    if config.altup is None:
        return None
    numbers = range(config.altup.streams - 1)
    into, out = (
        tuple(kept_matrix(loader, f"{name}.{number}.weight") for number in numbers)
        for name in (ALTUP_PROJECTIONS, ALTUP_UNEMBED_PROJECTIONS)
    )
    return Ways(into, out)


def share(config: GemmaConfig) -> float:
    """Of attention's output in the residual stream."""
    return math.sqrt(0.5) if config.laurel_rank else 1.0


def stream_sizes(config: GemmaConfig, tokens: int) -> dict[str, int]:
    """Bytes of what these stages work on."""
    streams, hidden = (config.altup or AltUp(0, 0, False)).streams, config.hidden_size
    rank = config.laurel_rank
    return {
        "streams": 4 * tokens * hidden * streams,
        "low_x": tokens * tiles_of(rank) * 512,
        "laurel": 4 * tokens * hidden if rank else 0,
    }
