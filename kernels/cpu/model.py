"""A model as the session runs it: packed layers, and the activations of a block of tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from uq.formats.config import EMBEDDING, FINAL_NORM, HEAD, GemmaConfig, layer_tensor
from uq.formats.manifest import gain_name
from uq.kernels.cpu.cache import RopeTable
from uq.kernels.cpu.elementwise import Activations
from uq.kernels.cpu.layout import Linear, WeightSource, pack

Array = NDArray[np.float32]

JOINED = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "out": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}
NO_GAIN: Array = np.empty(0, np.float32)
EVERYTHING = 1 << 62  # a window that no context fills


@dataclass(frozen=True)
class Layer:
    """One decoder layer. Gains that the family does not have are empty.

    Attributes:
        next_gain: of the norm behind this layer: the next layer's first, or the final one.
    """

    qkv: Linear
    out: Linear
    gate_up: Linear
    down: Linear
    q_gain: Array
    k_gain: Array
    attention_gain: Array
    mlp_gain: Array
    branch_gain: Array
    next_gain: Array
    window: int
    rope: RopeTable

    @property
    def linears(self) -> tuple[Linear, ...]:
        return self.qkv, self.out, self.gate_up, self.down


@dataclass(frozen=True)
class Model:
    """Every weight, packed.

    Attributes:
        data: the arena that all `Linear`s point into.
        table, head: of the embedding; the same where they are tied.
        first_gain: of the norm in front of the first layer.
    """

    data: NDArray[np.uint8]
    table: Linear
    head: Linear
    first_gain: Array
    layers: tuple[Layer, ...]

    @property
    def product_bytes(self) -> int:
        """Bytes of every linear and of the head."""
        linears = [linear for layer in self.layers for linear in layer.linears]
        return sum(linear.nbytes for linear in linears) + self.head.nbytes


@dataclass(frozen=True)
class Work:
    """Activations of a block of tokens, the first axis of every array.

    Attributes:
        hidden: the residual stream; `normed`: behind the last norm; `x`: the same as activations.
        qkv: projections; `queries` and `context`: what attention reads and gives.
        branch: output of attention or MLP before it joins `hidden`.
        gate_up: projections of the MLP.
    """

    hidden: Array
    normed: Array
    x: Activations
    qkv: Array
    queries: Array
    context: Array
    context_x: Activations
    branch: Array
    gate_up: Array
    gate_x: Activations

    def first(self, tokens: int) -> Work:
        return Work(
            hidden=self.hidden[:tokens],
            normed=self.normed[:tokens],
            x=self.x.rows(0, tokens),
            qkv=self.qkv[:tokens],
            queries=self.queries[:tokens],
            context=self.context[:tokens],
            context_x=self.context_x.rows(0, tokens),
            branch=self.branch[:tokens],
            gate_up=self.gate_up[:tokens],
            gate_x=self.gate_x.rows(0, tokens),
        )


def load(config: GemmaConfig, source: WeightSource) -> Model:
    """Read and pack a model."""
    arena = pack(source, _joined(config))
    table = arena.linears[EMBEDDING]
    return Model(
        data=arena.data,
        table=table,
        head=table if config.tied_head else arena.linears[HEAD],
        first_gain=_gain(source, layer_tensor(0, "input_layernorm")),
        layers=_layers(config, source, arena.linears),
    )


def _joined(config: GemmaConfig) -> dict[str, list[str]]:
    """Name of a `Linear` -> canonical names of its weights."""
    joined = {EMBEDDING: [EMBEDDING]} | ({} if config.tied_head else {HEAD: [HEAD]})
    for layer in range(config.num_layers):
        for key, roles in JOINED.items():
            joined[f"{layer}.{key}"] = [layer_tensor(layer, role) for role in roles]
    return joined


def _layers(
    config: GemmaConfig, source: WeightSource, linears: Mapping[str, Linear]
) -> tuple[Layer, ...]:
    ropes: dict[bool, RopeTable] = {}
    layers = []
    for index in range(config.num_layers):
        sliding = config.is_sliding(index)
        if sliding not in ropes:
            theta, scale = config.theta(index), config.position_scale(index)
            ropes[sliding] = RopeTable(theta, scale, config.head_dim)
        layers.append(_layer(config, source, linears, index, ropes[sliding]))
    return tuple(layers)


def _layer(
    config: GemmaConfig,
    source: WeightSource,
    linears: Mapping[str, Linear],
    index: int,
    rope: RopeTable,
) -> Layer:
    def gain(role: str, present: bool = True) -> Array:
        return _gain(source, layer_tensor(index, role)) if present else NO_GAIN

    last = index + 1 == config.num_layers
    behind = FINAL_NORM if last else layer_tensor(index + 1, "input_layernorm")
    # gemma calls the norm in front of the MLP by what it stands behind.
    mlp = "pre_feedforward_layernorm" if config.post_norms else "post_attention_layernorm"
    return Layer(
        **{key: linears[f"{index}.{key}"] for key in JOINED},
        q_gain=gain("self_attn.q_norm", config.qk_norm),
        k_gain=gain("self_attn.k_norm", config.qk_norm),
        attention_gain=gain("post_attention_layernorm", config.post_norms),
        mlp_gain=gain(mlp),
        branch_gain=gain("post_feedforward_layernorm", config.post_norms),
        next_gain=_gain(source, behind),
        window=config.window(index) or EVERYTHING,
        rope=rope,
    )


def _gain(source: WeightSource, norm: str) -> Array:
    return np.ascontiguousarray(source.array(gain_name(norm)), np.float32)


def workspace(config: GemmaConfig, layer: Layer, tokens: int) -> Work:
    hidden, q_size = config.hidden_size, config.q_size

    def floats(width: int) -> Array:
        return np.empty((tokens, width), np.float32)

    return Work(
        hidden=floats(hidden),
        normed=floats(hidden),
        x=Activations.empty(tokens, hidden),
        qkv=floats(layer.qkv.width),
        queries=floats(q_size),
        context=floats(q_size),
        context_x=Activations.empty(tokens, q_size),
        branch=floats(hidden),
        gate_up=floats(layer.gate_up.width),
        gate_x=Activations.empty(tokens, config.intermediate_size),
    )
