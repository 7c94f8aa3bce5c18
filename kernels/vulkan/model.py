"""A model as the kernels find it: weights, gains and the activations, by address."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from statistics import NormalDist

import numpy as np

from uq.formats.config import (
    EMBEDDING,
    FINAL_NORM,
    HEAD,
    PER_LAYER_EMBEDDING,
    Experts,
    GemmaConfig,
    layer_tensor,
)
from uq.formats.manifest import gain_name
from uq.kernels.vulkan.beside import (
    Mixture,
    PerLayerTable,
    Told,
    load_mixture,
    load_table,
    load_told,
)
from uq.kernels.vulkan.memory import Arena, Span
from uq.kernels.vulkan.state import STATE_BYTES
from uq.kernels.vulkan.updates import (
    Laurel,
    Updates,
    Ways,
    load_laurel,
    load_updates,
    load_ways,
    share,
    stream_sizes,
)
from uq.kernels.vulkan.weights import Kind, Loader, Matrix, padded_rows, tiles_of

COLUMNS = 16  # of a GEMV; more tokens of a pass are a GEMM
MOST_PARTS = 8  # of a product, summed by who reads it
MANY_PARTS = 4  # the same of a pass of more tokens than these
MOST_SPLIT = 64
WORKGROUPS = 256  # of attention, about, that keep a large GPU busy
MANY_HEADS = 16  # of keys and values
PEAK_LOGITS = 32  # of which peaks.comp keeps the greatest
ITEM_TILE = 32  # items that a workgroup takes: an item is a token and one of its experts
HEAD_ROWS = 1 << 14  # rows of the head whose logits of many tokens are computed at a time


@dataclass(frozen=True)
class Layer:
    """One decoder layer. Gains that the family does not have are None.

    Attributes:
        qkv: matrices, each with the row of the joint output at which it begins.
        columns: rows of the joint output at which q, k and v begin, and its length.
        next_gain: of the norm behind this layer: the next layer's first, or the final one.
        window: keys that a token sees, 0 for all.
        head_dim, kv_heads: of its attention.
        owns_keys: it writes keys and values; otherwise it reads an earlier layer's.
        scale: of its output.
        told, mixture, laurel, updates: what it has besides.
        quantile: of the normal distribution, by which its gate is thinned; None where it is not.
    """

    index: int
    qkv: list[tuple[Matrix, int]]
    columns: tuple[int, int, int, int]
    out: Matrix
    gate: Matrix
    up: Matrix
    down: Matrix
    q_gain: Span | None
    k_gain: Span | None
    attention_gain: Span | None
    mlp_gain: Span
    branch_gain: Span | None
    next_gain: Span
    window: int
    head_dim: int
    kv_heads: int
    owns_keys: bool
    scale: float
    told: Told | None
    mixture: Mixture | None
    laurel: Laurel | None
    updates: Updates | None
    quantile: float | None

    @property
    def matrices(self) -> tuple[Matrix, ...]:
        """Those that a token meets; an expert's stand for those of each that it chooses."""
        found = [*(matrix for matrix, _ in self.qkv), self.out, self.gate, self.up, self.down]
        found += (self.told.gate, self.told.projection) if self.told else ()
        found += (self.laurel.left, self.laurel.right) if self.laurel else ()
        return (*found, *(self.mixture.matrices if self.mixture else ()))


@dataclass(frozen=True)
class Model:
    table: Matrix
    head: Matrix
    first_gain: Span
    layers: tuple[Layer, ...]
    per_layer: PerLayerTable | None
    ways: Ways | None

    @property
    def matrices(self) -> list[Matrix]:
        """All that a token meets but the head."""
        found = [matrix for layer in self.layers for matrix in layer.matrices]
        found += (*self.ways.into, *self.ways.out) if self.ways else ()
        return found + ([self.per_layer.projection] if self.per_layer else [])

    @property
    def product_bytes(self) -> int:
        """Bytes of every linear that a token meets, and of the head."""
        return sum(matrix.nbytes for matrix in self.matrices) + self.head.nbytes


def weight_names(config: GemmaConfig) -> list[str]:
    """Every weight of a model that is quantized, and that lies in the device's own memory."""
    tables = [EMBEDDING] if config.tied_head else [EMBEDDING, HEAD]
    layers = range(config.num_layers)
    return tables + [layer_tensor(i, role) for i in layers for role in config.linear_shapes(i)]


def host_names(config: GemmaConfig) -> list[str]:
    """Weights that lie in memory of the host."""
    return [PER_LAYER_EMBEDDING] if config.per_layer else []


def kept_bytes(config: GemmaConfig) -> int:
    """Device bytes of the weights that are never quantized, at most."""
    shapes = [*config.model_kept().values()]
    for layer in range(config.num_layers):
        shapes += config.kept_shapes(layer).values()
    return sum(Kind("f32").tiled_bytes(*shape) for shape in shapes if len(shape) == 2)


def load_model(config: GemmaConfig, loader: Loader) -> Model:
    table = loader.matrix(EMBEDDING)
    head = table if config.tied_head else loader.matrix(HEAD)
    first = loader.gain(gain_name(layer_tensor(0, "input_layernorm")))
    layers = tuple(_layer(config, loader, index) for index in range(config.num_layers))
    ways = load_ways(config, loader)
    return Model(table, head, first, layers, load_table(config, loader), ways)


def _layer(config: GemmaConfig, loader: Loader, index: int) -> Layer:
    def name(role: str) -> str:
        return layer_tensor(index, role)

    def gain(role: str, present: bool) -> Span | None:
        return loader.gain(gain_name(name(role))) if present else None

    last = index + 1 == config.num_layers
    behind = FINAL_NORM if last else layer_tensor(index + 1, "input_layernorm")
    # gemma calls the norm in front of the MLP by what it stands behind.
    mlp = "pre_feedforward_layernorm" if config.post_norms else "post_attention_layernorm"
    sparsity = config.sparsity(index)
    owns_keys, present = config.kv_source(index) == index, config.linear_shapes(index)
    projections = [role for x in "qkv" if (role := f"self_attn.{x}_proj") in present]
    return Layer(
        index=index,
        qkv=loader.matrices([name(role) for role in projections]),
        columns=_columns([present[role][0] for role in projections]),
        out=loader.matrix(name("self_attn.o_proj")),
        gate=loader.matrix(name("mlp.gate_proj")),
        up=loader.matrix(name("mlp.up_proj")),
        down=loader.matrix(name("mlp.down_proj")),
        q_gain=gain("self_attn.q_norm", config.qk_norm),
        k_gain=gain("self_attn.k_norm", config.qk_norm and owns_keys),
        attention_gain=_attention_gain(config, loader, index) if config.post_norms else None,
        mlp_gain=loader.gain(gain_name(name(mlp))),
        branch_gain=gain("post_feedforward_layernorm", config.post_norms),
        next_gain=loader.gain(gain_name(behind)),
        window=config.window(index) or 0,
        head_dim=config.layer_head_dim(index),
        kv_heads=config.layer_kv_heads(index),
        owns_keys=owns_keys,
        scale=float(loader.source.array(name("layer_scalar"))[0]) if config.layer_scalar else 1.0,
        told=load_told(config, loader, index),
        mixture=load_mixture(config, loader, index),
        laurel=load_laurel(config, loader, index),
        updates=load_updates(config, loader, index),
        quantile=NormalDist().inv_cdf(sparsity) if sparsity else None,
    )


def _attention_gain(config: GemmaConfig, loader: Loader, layer: int) -> Span:
    """Times the share that attention's output has in the residual stream."""
    gain = loader.source.array(gain_name(layer_tensor(layer, "post_attention_layernorm")))
    return loader.put((gain * np.float32(share(config))).astype(np.float32))


def _columns(rows: Sequence[int]) -> tuple[int, int, int, int]:
    """`Layer.columns` of projections of so many rows: one may be key and value, or there is none
    of either."""
    *begins, end = accumulate(map(padded_rows, rows), initial=0)
    return begins[0], begins[min(1, len(begins) - 1)], begins[-1], end


@dataclass(frozen=True)
class Work:
    """Activations of the tokens of a pass, a token's values one after the other.

    Attributes:
        hidden, joined: the residual stream, before and behind what joined it last, in turns.
        branch: what joins it; `normed`: behind the last norm.
        x, context, gated: inputs of the linears (shaders/activations.glsl).
        half, units: one of those as float16, and what each token's were divided by.
        logits: behind the last token, or behind each column's. `peaks`: of neighbours among them.
        scores: logits of many tokens for some rows of the head.
        wide: projections of the MLP where they are joined later: gate's half and up's.
        plain: an input of linears of floating point, of `hidden_size` channels.
        projected, told: the per-layer inputs as they are made; told_gate, told_x: what one layer
            makes of its own.
        expert_x, expert_wide, expert_gated, expert_out: of the experts; router_scores, chosen,
            shares: which those are; items, item_tiles: tokens in the order of their experts.
        streams: the residual streams, where there are several; low_x, laurel: of the product of
            low rank.
        partials, split_stats: of attention, from each split.
        candidates: (value, id) from each workgroup.
    """

    state: Span
    hidden: Span
    joined: Span
    branch: Span
    normed: Span
    qkv: Span
    wide: Span
    logits: Span
    peaks: Span
    scores: Span
    partials: Span
    split_stats: Span
    candidates: Span
    x: Span
    context: Span
    gated: Span
    half: Span
    units: Span
    plain: Span
    projected: Span
    told: Span
    told_gate: Span
    told_x: Span
    expert_x: Span
    expert_wide: Span
    expert_gated: Span
    expert_out: Span
    router_scores: Span
    chosen: Span
    shares: Span
    items: Span
    item_tiles: Span
    streams: Span
    low_x: Span
    laurel: Span

    @classmethod
    def take(cls, arena: Arena, sizes: Mapping[str, int]) -> Work:
        """`sizes` are those of `work_sizes`."""
        return cls(**{name: arena.take(nbytes) for name, nbytes in sizes.items()})

    @property
    def spans(self) -> list[Span]:
        return list(vars(self).values())


def split_count(kv_heads: int) -> int:
    """Parts of the context that attention works on at the same time, for each key head."""
    return next((few for few in (16, 32) if few * kv_heads >= WORKGROUPS), 64)


def least_tiles(kv_heads: int) -> int:
    """Tiles of keys in a split, at least: many heads are workgroups enough with longer splits."""
    return 3 if kv_heads >= MANY_HEADS else 1


def work_sizes(
    config: GemmaConfig, tokens: int, sequences: int, *, is_float: bool
) -> dict[str, int]:
    """Bytes of each span of `Work` for passes of up to `tokens`, and so many sequences at a time.

    Both are `COLUMNS` at least.
    """
    layers, hidden = range(config.num_layers), config.hidden_size
    q, kv = max(map(config.layer_q_size, layers)), max(map(config.layer_kv_size, layers))
    mlp = max(map(config.layer_intermediate_size, layers))
    splits = max(split_count(config.layer_kv_heads(layer)) for layer in layers)
    vocab = padded_rows(config.vocab_size)
    unit = 512 if is_float else 288  # of 128 channels
    value, summed = 4 * tokens, 4 * max(tokens, min(tokens, MOST_SPLIT) * MOST_PARTS)
    common = {
        "state": STATE_BYTES,
        "hidden": value * hidden,
        "joined": value * hidden,
        "branch": max(summed, value * MANY_PARTS) * padded_rows(hidden),
        "normed": value * hidden,
        "qkv": summed * (padded_rows(q) + 2 * padded_rows(kv)),
        "wide": summed * 2 * padded_rows(mlp),
        "logits": 4 * vocab * sequences,
        "peaks": 4 * -(-vocab // PEAK_LOGITS) * sequences,
        "scores": value * min(vocab, HEAD_ROWS),
        "partials": 4 * sequences * q * splits,
        "split_stats": 8 * sequences * config.num_heads * splits,
        "candidates": 8 * vocab // 16,
        "x": tokens * tiles_of(hidden) * unit,
        "context": tokens * tiles_of(q) * unit,
        "gated": tokens * tiles_of(mlp) * unit,
        "half": tokens * _most_tiles_of_column(config, max(hidden, q, mlp)) * 256,
        "units": value * (config.experts.active if config.experts else 1),
    }
    return common | _extra_sizes(config, tokens, unit)


def most_item_tiles(items: int, experts: int) -> int:
    """Tiles of items that meet one expert, at most."""
    return items // ITEM_TILE + min(items, experts)


def _most_tiles_of_column(config: GemmaConfig, channels: int) -> int:
    """Tiles of 128 channels that a column has, or all its experts' together."""
    experts = config.experts or Experts(0, 0, 0)
    return max(tiles_of(channels), experts.active * tiles_of(experts.intermediate_size))


def _extra_sizes(config: GemmaConfig, tokens: int, unit: int) -> dict[str, int]:
    """Of what only some models need; a word where there is none.

    Args:
        unit: bytes of 128 channels of activations.
    """
    told = config.per_layer.size if config.per_layer else 0
    experts = config.experts or Experts(0, 0, 0)
    hidden, chosen, value = config.hidden_size, tokens * experts.active, 4 * tokens
    sizes = {
        "plain": tokens * tiles_of(hidden) * 512 if told or experts.count else 0,
        **stream_sizes(config, tokens),
        "projected": value * told * config.num_layers,
        "told": value * told * config.num_layers,
        "told_gate": value * padded_rows(told),
        "told_x": tokens * tiles_of(told) * 512,
        "expert_x": tokens * tiles_of(hidden) * unit if experts.count else 0,
        "expert_gated": chosen * tiles_of(experts.intermediate_size) * unit,
        "expert_wide": 8 * chosen * experts.intermediate_size,
        "expert_out": 4 * chosen * hidden,
        "router_scores": value * padded_rows(experts.count),
        "chosen": 4 * chosen,
        "shares": 4 * chosen,
        "items": 4 * chosen,
        "item_tiles": 16 * most_item_tiles(chosen, experts.count),
    }
    return {name: max(4, nbytes) for name, nbytes in sizes.items()}
