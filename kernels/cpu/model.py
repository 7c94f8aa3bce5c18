"""A model as the session runs it: packed layers, and the activations of a block of tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from uq.formats.config import EMBEDDING, FINAL_NORM, HEAD, GemmaConfig, layer_tensor
from uq.formats.manifest import gain_name
from uq.kernels.cpu.cache import RopeTable
from uq.kernels.cpu.elementwise import Activations
from uq.kernels.cpu.extras import LAUREL_SHARE, Beside, Extras, PerLayerTable, has_extras
from uq.kernels.cpu.layout import Linear, WeightSource, pack
from uq.kernels.cpu.streams import Streams

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
        source: the layer whose keys and values it reads.
        columns: of q, k and v in its projections; of keys and values -1 where it has none.
        v_gain: all ones where values are normed.
        extras: what it does besides; None in most models.
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
    source: int
    kv_heads: int
    head_dim: int
    columns: tuple[int, int, int]
    v_gain: Array
    extras: Extras | None

    @property
    def linears(self) -> tuple[Linear, ...]:
        return self.qkv, self.out, self.gate_up, self.down

    @property
    def head_gains(self) -> tuple[Array, Array, Array]:
        return self.q_gain, self.k_gain, self.v_gain


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
    per_layer: PerLayerTable | None
    streams: Streams | None

    def enter(self, tokens: NDArray[np.int32], hidden: Array) -> Beside:
        """What goes with some tokens; hidden (tokens, hidden) is their embedding, and becomes what
        layer 0 finds.
        """
        inputs = self.per_layer.inputs(tokens, hidden) if self.per_layer else None
        return Beside(inputs, self.streams.spread(hidden) if self.streams else None)

    @property
    def product_bytes(self) -> int:
        """Bytes of every linear that a token meets, and of the head."""
        linears = [linear for layer in self.layers for linear in layer.linears]
        beside = sum(layer.extras.active_bytes for layer in self.layers if layer.extras)
        beside += sum(part.active_bytes for part in (self.per_layer, self.streams) if part)
        return sum(linear.nbytes for linear in linears) + self.head.nbytes + beside


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
        per_layer=PerLayerTable(config, source) if config.per_layer else None,
        streams=Streams(config, source) if config.altup else None,
    )


def _joined(config: GemmaConfig) -> dict[str, list[str]]:
    """Name of a `Linear` -> canonical names of its weights."""
    joined = {EMBEDDING: [EMBEDDING]} | ({} if config.tied_head else {HEAD: [HEAD]})
    for layer in range(config.num_layers):
        present = config.linear_shapes(layer)
        for key, roles in JOINED.items():
            names = [layer_tensor(layer, role) for role in roles if role in present]
            joined[f"{layer}.{key}"] = names
        for role in config.expert_roles(layer):
            joined[f"{layer}.{role}"] = [layer_tensor(layer, role)]
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
            head_dim, pairs = config.layer_head_dim(index), config.rotary_pairs(index)
            ropes[sliding] = RopeTable(theta, scale, head_dim, pairs)
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
    owns_keys, dim = config.kv_source(index) == index, config.layer_head_dim(index)
    share = LAUREL_SHARE if config.laurel_rank else np.float32(1)
    return Layer(
        **{key: linears[f"{index}.{key}"] for key in JOINED},
        q_gain=gain("self_attn.q_norm", config.qk_norm),
        k_gain=gain("self_attn.k_norm", config.qk_norm and owns_keys),
        attention_gain=gain("post_attention_layernorm", config.post_norms) * share,
        mlp_gain=gain(mlp),
        branch_gain=gain("post_feedforward_layernorm", config.post_norms),
        next_gain=_gain(source, behind),
        window=config.window(index) or EVERYTHING,
        rope=rope,
        source=config.kv_source(index),
        kv_heads=config.layer_kv_heads(index),
        head_dim=dim,
        columns=_columns(linears[f"{index}.qkv"]),
        v_gain=np.ones(dim if config.value_norm else 0, np.float32),
        extras=Extras(config, source, linears, index) if has_extras(config) else None,
    )


def _columns(qkv: Linear) -> tuple[int, int, int]:
    """Where q, k and v begin; one projection may serve keys and values, or there is none."""
    if len(qkv.columns) == 1:
        return 0, -1, -1
    return qkv.columns[0], qkv.columns[1], qkv.columns[-1]


def _gain(source: WeightSource, norm: str) -> Array:
    return np.ascontiguousarray(source.array(gain_name(norm)), np.float32)


class Workspace:
    """Room for the activations of up to `tokens` tokens, for the widest layer.

    Layers of the same widths have the same views of it.
    """

    def __init__(self, config: GemmaConfig, layers: Sequence[Layer], tokens: int) -> None:
        self._widths = [widths(layer) for layer in layers]
        kinds = dict.fromkeys(self._widths)
        hidden = config.hidden_size
        self._shared = (*(np.empty((tokens, hidden), np.float32) for _ in range(3)),)
        self._x = Activations.empty(tokens, hidden)
        qkv, q, gate_up, mlp = (max(sizes) for sizes in zip(*kinds, strict=True))
        self._flat = [np.empty(tokens * width, np.float32) for width in (qkv, q, q, gate_up)]
        self._context_x = Activations.empty(tokens, q)
        self._gate_x = Activations.empty(tokens, mlp)
        self._one = self._views(1)

    def views(self, tokens: int) -> list[Work]:
        """Of so many tokens, for each layer."""
        return self._one if tokens == 1 else self._views(tokens)

    def _views(self, tokens: int) -> list[Work]:
        kinds = {kind: self._view(tokens, *kind) for kind in dict.fromkeys(self._widths)}
        return [kinds[kind] for kind in self._widths]

    def _view(self, tokens: int, qkv: int, q: int, gate_up: int, mlp: int) -> Work:
        hidden, normed, branch = (array[:tokens] for array in self._shared)
        projected, queries, context, gated = (
            flat[: tokens * width].reshape(tokens, width)
            for flat, width in zip(self._flat, (qkv, q, q, gate_up), strict=True)
        )
        return Work(
            hidden=hidden,
            normed=normed,
            x=self._x.rows(0, tokens),
            qkv=projected,
            queries=queries,
            context=context,
            context_x=self._context_x.narrow(tokens, q),
            branch=branch,
            gate_up=gated,
            gate_x=self._gate_x.narrow(tokens, mlp),
        )


def widths(layer: Layer) -> tuple[int, int, int, int]:
    """Columns of a layer's projections, its queries, its gate and up, and its MLP."""
    return layer.qkv.width, layer.out.cols, layer.gate_up.width, layer.down.cols
