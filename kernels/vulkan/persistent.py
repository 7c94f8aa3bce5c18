"""All layers of one token in one dispatch: what `persistent.comp` is given, and when it may run.

Between two dispatches a GPU stands still for two microseconds, five times a layer or more. Here a
workgroup on each multiprocessor stays, and waits for what it needs of the others' results.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from uq.formats.config import GemmaConfig
from uq.kernels.vulkan.cache import Cache
from uq.kernels.vulkan.commands import Recorder
from uq.kernels.vulkan.device import PhysicalGpu
from uq.kernels.vulkan.memory import Arena, Span, Transfers, aligned
from uq.kernels.vulkan.model import Layer, Model, least_tiles, split_count
from uq.kernels.vulkan.persistent_cuts import MOST_LANES, SLICE, held_tiles, shapes
from uq.kernels.vulkan.persistent_places import (
    LEDGER_BYTES,
    expert_sharing,
    expert_sizes,
    head_sizes,
    kept_columns,
    key_column,
    layers_vary,
    message_bytes,
    most_splits,
    own_columns,
)
from uq.kernels.vulkan.persistent_plans import STAGES, WORDS, stage_plans
from uq.kernels.vulkan.persistent_shares import shares
from uq.kernels.vulkan.push import addresses
from uq.kernels.vulkan.stages import ATTENTION_LANES, Stages
from uq.kernels.vulkan.tuning import Cut, Measured
from uq.kernels.vulkan.variants import VARIANTS
from uq.kernels.vulkan.weights import TILE_COLS, Matrix

EMPTY = 0xFFFFFFFF  # what is no message
PATIENCE = 1 << 16  # looks at a message, somewhat less than a microsecond each
MOST_CHANNELS = 5376  # of the residual stream: it stays in registers
ROUTED = 8  # experts whose scores a workgroup makes at a time, at most
ENTRY = WORDS * STAGES + 27  # words of 64 bits of a layer, as in shaders/persistent.comp


@dataclass(frozen=True)
class Persistent:
    """Records the layers of one token over one KV cache.

    Attributes:
        entries: addresses of each layer's weights, gains, keys and values.
        messages: what workgroups tell each other.
        items: what each of them multiplies.
    """

    stages: Stages
    cache: Cache
    cut: Cut
    entries: Span
    ledger: Span
    messages: Span
    items: Span

    @classmethod
    def make(
        cls, stages: Stages, cache: Cache, cut: Cut, arena: Arena, transfers: Transfers
    ) -> Persistent:
        layers = range(stages.config.num_layers + 1)
        words = np.array([_entry(stages, cache, cut, layer) for layer in layers], np.uint64)
        entries = arena.take(words.nbytes)
        transfers.write(entries, words)
        ledger = arena.take(LEDGER_BYTES)
        transfers.fill(ledger)
        messages = arena.take(message_bytes(stages.config, cut))
        transfers.write(messages, np.full(messages.nbytes // 4, EMPTY, np.uint32))
        lists = shares(stages.config, cut)
        items = arena.take(lists.nbytes)
        transfers.write(items, lists)
        return cls(stages, cache, cut, entries, ledger, messages, items)

    def record(self, recorder: Recorder) -> None:
        """From the embedding to the final norm's output."""
        stages, work = self.stages, self.stages.work
        if stages.model.per_layer:
            stages.per_layer_inputs(recorder, stages.model.per_layer)
        recorder.label = "layers"
        push = addresses(self.entries, work.state, self.ledger, self.messages, self.items)
        push += addresses(work.hidden, work.normed, work.x)
        name = module(stages.model, self.cache.suffix)
        pipeline = stages.pipelines.get(name, **_constants(stages, self.cut))
        stages.run(recorder, pipeline, push, (self.cut.workgroups, 1, 1))
        recorder.barrier()


def module(model: Model, suffix: str) -> str:
    """Of the table of variants, if it is there; `suffix` is the cache's."""
    return f"persistent{suffix}_{model.layers[0].out.kind.name}_dot"


def suits(stages: Stages, suffix: str, physical: PhysicalGpu) -> bool:
    """Whether the kernel knows such a model, and such a device."""
    enough = physical.multiprocessors > 0 and physical.most_lanes >= MOST_LANES
    return enough and physical.subgroup[0] <= SLICE and knows(stages, suffix)


def knows(stages: Stages, suffix: str) -> bool:
    config, model = stages.config, stages.model
    kinds = {matrix.kind for layer in model.layers for matrix in _linears(layer)}
    return (
        stages.tuning.integer_dot
        and not model.ways
        and len(kinds) == 1
        and module(model, suffix) in VARIANTS
        and all(_is_plain(layer) for layer in model.layers)
        and not (config.per_layer and config.experts)
        and config.hidden_size <= MOST_CHANNELS
        and _fit(config)
        and expert_sizes(config)[1] % ROUTED == 0
    )


def _linears(layer: Layer) -> tuple[Matrix, ...]:
    qkv = (matrix for matrix, _ in layer.qkv)
    experts = (layer.mixture.gate, layer.mixture.down) if layer.mixture else ()
    return (*qkv, layer.out, layer.gate, layer.up, layer.down, *experts)


def _is_plain(layer: Layer) -> bool:
    """As Gemma 1 to 4 have it."""
    extras, told, mixture = (layer.laurel, layer.updates, layer.quantile), layer.told, layer.mixture
    kept = [told.gate, told.projection] if told else []
    kept += [mixture.router] if mixture else []
    names = {matrix.kind.name for matrix in kept}
    return not any(extras) and len(layer.qkv) == 1 and names <= {"bf16"}


def _fit(config: GemmaConfig) -> bool:
    """Whether the kernel has such heads: where layers differ, it shifts instead of dividing."""
    varies = layers_vary(config)
    dims = [dim for dim, _ in head_sizes(config)]
    return all(dim % TILE_COLS == 0 and not (varies and dim & dim - 1) for dim in dims)


def tuned(stages: Stages, known: Measured, suffix: str, physical: PhysicalGpu) -> Stages:
    """With what was measured for its products and layers."""
    cut = known.layers.get(model_key(stages.config))
    if cut is None or not suits(stages, suffix, physical):
        tuning = replace(stages.tuning, measured=known.products, cut=None)
    else:
        measured = {**known.products, **shapes(stages.model, cut)}
        tuning = replace(stages.tuning, measured=measured, cut=cut)
    return replace(stages, tuning=tuning)


def model_key(config: GemmaConfig) -> str:
    """Of `Measured.layers`."""
    sizes = (config.hidden_size, config.intermediate_size, config.head_dim)
    heads = (config.num_heads, config.num_kv_heads, config.num_layers)
    return "x".join(map(str, (*sizes, *heads)))


def arena_bytes(config: GemmaConfig, cut: Cut) -> int:
    entries = 8 * ENTRY * (config.num_layers + 1)
    lists = shares(config, cut).nbytes
    return sum(map(aligned, (entries, LEDGER_BYTES, message_bytes(config, cut), lists)))


def _constants(stages: Stages, cut: Cut) -> dict[str, int | float]:
    config = stages.config
    heads = head_sizes(config)
    active, count, size = expert_sizes(config)
    return {
        "LANES": cut.lanes,
        "ATTENDING": ATTENTION_LANES,  # as attention has alone: the same bits
        **stages.model.layers[0].out.kind.constants,
        "DEPTH": cut.depth,
        "PATIENCE": PATIENCE,
        "HIDDEN": config.hidden_size,
        "EPS": float(config.rms_norm_eps),
        "POST_NORM": config.post_norms,
        "HEAD_DIM": heads[0][0],
        "FULL_DIM": heads[-1][0] if layers_vary(config) else 0,
        "HEADS": config.num_heads,
        "KEY_HEADS": heads[0][1],
        "QUERIES": cut.queries,
        "SPLITS": most_splits(config, cut),
        "QK_NORM": config.qk_norm,
        "VALUE_NORM": config.value_norm,
        "SCALE": float(config.attention_scale),
        "CAP": float(config.attn_softcap or 0.0),
        "INTERMEDIATE": max(map(config.layer_intermediate_size, range(config.num_layers))),
        "QKV_COLUMNS": own_columns(config),
        "KEPT_COLUMNS": kept_columns(config),
        "LAYERS": config.num_layers,
        "DOWN_PARTS": cut.down_parts,
        "TEAMS": sum(team << 4 * i for i, team in enumerate(cut.teams)),
        "HELD_TILES": held_tiles(config, cut),
        "OUT_PARTS": cut.out_parts,
        "JOINS": cut.joins,
        "WIDTH": cut.width,
        "RUN": least_run(heads[0][1]),
        "TOLD": config.per_layer.size if config.per_layer else 0,
        "ACTIVE": active,
        "COUNT": count,
        "EXPERT_ROWS": size,
        "SHARING": expert_sharing(cut, active, size),
        "MOST_SPLITS": cut.splits or most_splits(config, cut),
        "LIST": shares(config, cut).shape[1],
        "STRAIGHT": cut.straight,
        "READS": cut.reads,
    }


def _entry(stages: Stages, cache: Cache, cut: Cut, index: int) -> list[int]:
    """Of a layer, or of what stands behind the last one: addresses, and sizes, two in a word.

    Behind the last one are weights, too: some are asked for and not used.
    """
    config, layers = stages.config, stages.model.layers
    layer = layers[min(index, len(layers) - 1)]
    source = layers[config.kv_source(layer.index)]
    turns = cache.turns[config.is_sliding(layer.index)]
    plans = stage_plans(config, cut, layer.index, list(_products(layer)))
    spans = [layer.q_gain or turns, source.k_gain or turns, *cache.spans(layer.index), turns]
    keys = key_column(config, source.index)
    sizes = (
        (layer.window, cache.size.slots[layer.index]),
        (layer.head_dim, layer.kv_heads),
        (layer.gate.rows, layer.qkv[0][0].rows),
        (keys, keys + source.columns[2] - source.columns[1]),
        (source.index in config.shared_sources, cut.splits or split_count(layer.kv_heads)),
        (_word(layers[index - 1].scale if index else 1.0), least_run(layer.kv_heads)),
    )
    words = [low | high << 32 for low, high in sizes]
    behind = [*_gains(stages.model, index), *_told(stages, layer)]
    behind += _mixture(layer, layers[index - 1] if index else layer)
    before = [span.address for span in spans]
    return [*plans, *before, *words, *(span.address for span in behind)]


def _products(layer: Layer) -> Iterator[tuple[Matrix, Matrix]]:
    """In their order, of each its first matrix and its last one."""
    experts, qkv = layer.mixture, layer.qkv[0][0]
    yield qkv, qkv
    yield layer.out, layer.out
    yield layer.gate, layer.up
    if experts:
        yield experts.gate, experts.up
    yield layer.down, layer.down
    if experts:
        yield experts.down, experts.down


def least_run(kv_heads: int) -> int:
    """Keys of a split, at least."""
    return ATTENTION_LANES // 8 * least_tiles(kv_heads)


def _word(value: float) -> int:
    return int(np.float32(value).view(np.uint32))


def _gains(model: Model, index: int) -> tuple[Span, ...]:
    """Of the norms behind the layer before and in front of this one, behind attention and in front
    of the MLP, and behind that; what there is none of is anything."""
    before = model.layers[index - 1] if index else None
    layer = model.layers[min(index, len(model.layers) - 1)]
    gain = before.next_gain if before else model.first_gain
    joined = before and (before.told.gain if before.told else before.branch_gain)
    attention, mlp = layer.attention_gain or gain, layer.branch_gain or gain
    return joined or gain, gain, attention, layer.mlp_gain, mlp


def _mixture(layer: Layer, before: Layer) -> list[Span]:
    """Its router, and gains in front of router and experts; and those behind the MLP and the
    experts of the layer before."""
    own, other = layer.mixture, before.mixture
    if own is None or other is None:
        return [layer.mlp_gain] * 6
    gains = [own.router_gain, own.input_gain, other.mlp_gain, other.output_gain]
    return [own.router.span, own.factors, *gains]


def _told(stages: Stages, layer: Layer) -> tuple[Span, Span, Span]:
    """Weights of its per-layer gate and projection, and its part of the embedding."""
    told, gain = layer.told, layer.mlp_gain
    if told is None:
        return gain, gain, gain
    size = 4 * told.gate.rows
    part = stages.work.told.part(layer.index * size, size)
    return told.gate.span, told.projection.span, part
