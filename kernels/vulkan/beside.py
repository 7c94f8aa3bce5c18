"""What layers have beside attention and MLP, on the device: experts, the per-layer embedding."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from uq.formats.config import (
    PER_LAYER_EMBEDDING,
    PER_LAYER_NORM,
    PER_LAYER_PROJECTION,
    GemmaConfig,
    layer_tensor,
)
from uq.formats.manifest import gain_name
from uq.kernels.experts import DOWN, GATE_UP
from uq.kernels.vulkan.memory import Span
from uq.kernels.vulkan.sources import float_tiles
from uq.kernels.vulkan.weights import TILE_ROWS, Kind, Loader, Matrix

Array = NDArray[np.float32]


@dataclass(frozen=True)
class PerLayerTable:
    """The per-layer embedding in memory of the host, which kernels read a row of, and what every
    layer's inputs are made with.

    Attributes:
        projection: (layers * size, hidden), of the embedding in front of layer 0.
        gain: of the norm behind it.
    """

    table: Matrix
    projection: Matrix
    gain: Span


@dataclass(frozen=True)
class Told:
    """How a layer takes in its part of the per-layer embedding.

    Attributes:
        gate: (size, hidden); `projection`: (hidden, size).
        gain: of the norm behind them.
    """

    gate: Matrix
    projection: Matrix
    gain: Span


@dataclass(frozen=True)
class ExpertOutputs:
    """What joins the output of a layer's MLP.

    Attributes:
        values: (column, count, hidden); of one, their sum is done.
        shares: (column, count).
        mlp_gain, gain: of the norms behind the MLP and behind the sum.
    """

    values: Span
    shares: Span
    mlp_gain: Span
    gain: Span
    count: int = 1


@dataclass(frozen=True)
class Mixture:
    """Experts of a layer.

    Attributes:
        active: that a token chooses.
        router: (experts, hidden); its input's gain and each expert's factor.
        gate, up, down: those of the first expert; the others follow. gate_up: both as one.
        steps: from an expert to the next, in row blocks of gate and up, and of down.
        mlp_gain, input_gain, output_gain: of the norms behind the layer's own MLP, in front of the
            experts and behind them.
    """

    active: int
    router: Matrix
    router_gain: Span
    factors: Span
    gate_up: Matrix
    gate: Matrix
    up: Matrix
    down: Matrix
    steps: tuple[int, int]
    mlp_gain: Span
    input_gain: Span
    output_gain: Span

    @property
    def matrices(self) -> tuple[Matrix, ...]:
        """Those that a token meets."""
        return (self.router, *(self.gate, self.up, self.down) * self.active)


def load_table(config: GemmaConfig, loader: Loader) -> PerLayerTable | None:
    if config.per_layer is None:
        return None
    return PerLayerTable(
        table=loader.host_matrix(PER_LAYER_EMBEDDING),
        projection=kept_matrix(loader, f"{PER_LAYER_PROJECTION}.weight"),
        gain=loader.gain(gain_name(f"{PER_LAYER_NORM}.weight")),
    )


def load_told(config: GemmaConfig, loader: Loader, layer: int) -> Told | None:
    if config.per_layer is None:
        return None
    return Told(
        gate=kept_matrix(loader, layer_tensor(layer, "per_layer_input_gate")),
        projection=kept_matrix(loader, layer_tensor(layer, "per_layer_projection")),
        gain=loader.gain(gain_name(layer_tensor(layer, "post_per_layer_input_norm"))),
    )


def load_mixture(config: GemmaConfig, loader: Loader, layer: int) -> Mixture | None:
    if config.experts is None:
        return None

    def gain(role: str) -> Span:
        return loader.gain(gain_name(layer_tensor(layer, role)))

    size, hidden = config.experts.intermediate_size, config.hidden_size
    both = loader.matrix(layer_tensor(layer, GATE_UP))
    scale = loader.source.array(layer_tensor(layer, "router.scale"))
    return Mixture(
        active=config.experts.active,
        router=kept_matrix(loader, layer_tensor(layer, "router.proj")),
        router_gain=loader.put(scale * np.float32(hidden**-0.5)),
        factors=loader.gain(layer_tensor(layer, "router.per_expert_scale")),
        gate_up=both.from_row(0, 2 * size),
        gate=both.from_row(0, size),
        up=both.from_row(size, size),
        down=loader.matrix(layer_tensor(layer, DOWN)).from_row(0, hidden),
        steps=(2 * size // TILE_ROWS, hidden // TILE_ROWS),
        mlp_gain=gain("post_feedforward_layernorm_1"),
        input_gain=gain("pre_feedforward_layernorm_2"),
        output_gain=gain("post_feedforward_layernorm_2"),
    )


def kept_matrix(loader: Loader, name: str) -> Matrix:
    """A matrix that is never quantized, in bfloat16 where that loses nothing."""
    values = np.ascontiguousarray(loader.source.array(name), np.float32)
    kind = Kind("f32" if (values.view(np.uint32) & 0xFFFF).any() else "bf16")
    rows, cols = values.shape
    span = loader.put(float_tiles(values, kind.name))
    return Matrix(kind, rows, cols, span, kind.nbytes(rows, cols))
