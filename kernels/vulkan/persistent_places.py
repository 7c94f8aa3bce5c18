"""Sizes of the layers that one dispatch computes, and the places of its workgroups' messages."""

from __future__ import annotations

from functools import partial
from itertools import accumulate
from math import gcd

from uq.formats.config import GemmaConfig
from uq.kernels.vulkan.model import split_count
from uq.kernels.vulkan.tuning import Cut
from uq.kernels.vulkan.weights import TILE_COLS, tiles_of

COPIES, LEDGER_BYTES = 8, 16  # of the places for messages
SPLIT_STEP = 16  # shares of so many splits are made at a time


def head_sizes(config: GemmaConfig) -> list[tuple[int, int]]:
    """(channels, key heads) of layers that slide and of the others, as far as there are such."""
    found = {
        not config.is_sliding(layer): (config.layer_head_dim(layer), config.layer_kv_heads(layer))
        for layer in range(config.num_layers)
    }
    return [found[kind] for kind in sorted(found)]


def layers_vary(config: GemmaConfig) -> bool:
    """Whether layers differ in more than the kind of their attention."""
    heads = len(set(head_sizes(config))) > 1
    return heads or bool(config.intermediate_sizes) or config.layer_scalar


def expert_sizes(config: GemmaConfig) -> tuple[int, int, int]:
    """That a token meets; how many there are, and rows of one's gate."""
    found = config.experts
    return (found.active, found.count, found.intermediate_size) if found else (0, 0, 0)


def expert_sharing(cut: Cut, active: int, size: int) -> int:
    """Slices of a team that share an expert's columns of down: as many as leave few chunks."""
    if not active:
        return 1
    most = gcd(cut.teams[5], tiles_of(size))
    counts = [count for count in range(most, 0, -1) if most % count == 0]
    return min(counts, key=partial(expert_chunks, cut, active, size))


def expert_chunks(cut: Cut, active: int, size: int, sharing: int) -> int:
    """That a slice has of the experts' down."""
    return -(-active // (cut.teams[5] // sharing)) * -(-tiles_of(size) // (sharing * cut.depth))


def most_splits(config: GemmaConfig, cut: Cut) -> int:
    """Of the context, for which there are places: a multiple of 16."""
    if cut.splits:
        return -(-cut.splits // SPLIT_STEP) * SPLIT_STEP
    return max(split_count(kv_heads) for _, kv_heads in head_sizes(config))


def own_columns(config: GemmaConfig) -> int:
    """Messages of q, k and v that a layer has for itself."""
    sizes = ((config.layer_q_size(i), config.layer_kv_size(i)) for i in range(config.num_layers))
    return max(q + 2 * kv for q, kv in sizes)


def kept_columns(config: GemmaConfig) -> int:
    """Keys and values of layers whose ones others read, too."""
    return 2 * sum(map(config.layer_kv_size, config.shared_sources))


def key_column(config: GemmaConfig, layer: int) -> int:
    """At which among the messages of q, k and v the layer's keys begin.

    Those that other layers read, too, have a place behind those of a layer.
    """
    if layer not in config.shared_sources:
        return config.layer_q_size(layer)
    before = [source for source in config.shared_sources if source < layer]
    return _plane(own_columns(config)) + 2 * sum(map(config.layer_kv_size, before))


def copy_words(config: GemmaConfig, cut: Cut) -> int:
    """Places for the messages of a layer, as shaders/persistent.comp counts them."""
    return sum(_planes(config, cut))


def stage_places(config: GemmaConfig, cut: Cut) -> tuple[int, ...]:
    """Where messages begin: of q, k and v; of attention's output; of gate and up; of down; of
    experts' gate and up; of their down."""
    begins = [0, *accumulate(_planes(config, cut))]
    return begins[0], begins[2], begins[3], begins[4], begins[9], begins[8]


def _planes(config: GemmaConfig, cut: Cut) -> list[int]:
    """Words of what follows each other: q, k and v; attention's context and output; gate and up;
    down; attention's partial sums, and their peaks and totals; the per-layer gate or the router;
    what joins behind the MLP; the experts' gate and up."""
    layers, splits = range(config.num_layers), most_splits(config, cut)
    q = max(map(config.layer_q_size, layers))
    told = config.per_layer.size if config.per_layer else 0
    active, count, size = expert_sizes(config)
    hidden = _plane(config.hidden_size)
    return [
        _plane(own_columns(config)),
        _plane(q),
        cut.out_parts * hidden,
        _plane(max(map(config.layer_intermediate_size, layers))),
        cut.down_parts * hidden,
        splits * q,
        _plane(2 * splits * config.num_heads),
        _plane(told + count),
        hidden if told or count else 0,
        active * _plane(size),
    ]


def message_bytes(config: GemmaConfig, cut: Cut) -> int:
    return 4 * (COPIES * copy_words(config, cut) + 2 * _plane(kept_columns(config)))


def _plane(channels: int) -> int:
    return TILE_COLS * tiles_of(channels)
