"""GGUF metadata of gemma3n and gemma4, whose layers differ, as llama.cpp's converter writes it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from statistics import NormalDist
from typing import Any

import numpy as np

from uq.errors import CheckpointError
from uq.formats.checkpoint.gguf_metadata import Metadata, common
from uq.formats.checkpoint.tensors import read_rows
from uq.formats.config import (
    FULL,
    SLIDING,
    AltUp,
    Experts,
    FullLayers,
    GemmaConfig,
    PerLayerEmbedding,
)
from uq.formats.families.family import GgufDefaults

# Where a gemma3n file is silent: so many layers have keys and values, and so many a sparse gate.
OWN_KEYS, SPARSE_LAYERS, SPARSITY = 20, 10, 0.95
TURNS_NOT = 1e29  # a RoPE factor beyond this: the pair stays as it is


def read_gemma3n(meta: Metadata) -> GemmaConfig:
    """Raises CheckpointError: a value is missing or broken."""
    fields, layers = common(meta), meta.integer("block_count")
    heads = fields["num_heads"]
    streams = meta.integer("altup.num_inputs", 4, most=64)
    return GemmaConfig(
        family=meta.arch,
        **fields,
        **_widths(meta, layers),
        num_kv_heads=meta.integer("attention.head_count_kv", heads),
        head_dim=meta.integer("attention.key_length", max(fields["hidden_size"] // heads, 1)),
        query_pre_attn_scalar=1.0,
        value_norm=True,
        kv_shared_layers=_shared(meta, fields["layer_types"], max(0, layers - OWN_KEYS)),
        per_layer=_per_layer(meta, 256),
        altup=AltUp(
            streams, meta.integer("altup.active_idx", 0, streams - 1, least=0), scaled=True
        ),
        laurel_rank=_rows(meta, "blk.0.laurel_l.weight"),
        activation_sparsity=_sparsity(meta, layers),
    )


def read_gemma4(meta: Metadata) -> GemmaConfig:
    """Raises CheckpointError: a value is missing or broken."""
    fields, layers = common(meta), meta.integer("block_count")
    types = fields["layer_types"]
    kv_heads = meta.integers("attention.head_count_kv", layers, fields["num_heads"])
    full_dim = meta.integer("attention.key_length")
    full = types.index(FULL) if FULL in types else 0
    config = GemmaConfig(
        family=meta.arch,
        **fields,
        **_widths(meta, layers),
        num_kv_heads=kv_heads[types.index(SLIDING) if SLIDING in types else 0],
        head_dim=meta.integer("attention.key_length_swa", full_dim),
        query_pre_attn_scalar=1.0,
        value_norm=True,
        full=FullLayers(
            head_dim=full_dim,
            num_kv_heads=kv_heads[full],
            rotary_pairs=_rotary_pairs(meta, full_dim),
            key_is_value=f"blk.{full}.attn_v.weight" not in meta.file.tensors,
        ),
        kv_shared_layers=_shared(meta, types, 0),
        layer_scalar=True,
        per_layer=_per_layer(meta, 0),
        experts=_experts(meta),
    )
    if any(kv_heads[layer] != config.layer_kv_heads(layer) for layer in range(layers)):
        found = "not the same for all layers of a type"
        raise meta.refuse("attention.head_count_kv", found, "one number for each type of layer")
    return config


def _widths(meta: Metadata, layers: int) -> dict[str, Any]:
    widths = meta.integers("feed_forward_length", layers)
    return {
        "intermediate_size": widths[0],
        "intermediate_sizes": widths if len(set(widths)) > 1 else (),
    }


def _shared(meta: Metadata, types: tuple[str, ...], default: int) -> int:
    """Layers that read the keys and values of others, each of a layer of its type."""
    key = "attention.shared_kv_layers"
    shared = meta.integer(key, default, most=len(types) - 1, least=0)
    own = len(types) - shared
    if not set(types[own:]) <= set(types[:own]):
        raise meta.refuse(key, str(shared), "a layer of each type in front of those that share")
    return shared


def _per_layer(meta: Metadata, default: int) -> PerLayerEmbedding | None:
    size = meta.integer("embedding_length_per_layer_input", default, least=0)
    rows = _rows(meta, "per_layer_token_embd.weight") if size else 0
    return PerLayerEmbedding(rows, size) if size else None


def _rows(meta: Metadata, tensor: str) -> int:
    if tensor not in meta.file.tensors:
        raise CheckpointError(f"{meta.file.path.name}: {tensor} is missing")
    return meta.file.tensors[tensor].shape[0]


def _sparsity(meta: Metadata, layers: int) -> tuple[float, ...]:
    """The file has quantiles of the normal distribution in place of shares."""
    key = "activation_sparsity_scale"
    quantiles = meta.get(key, None)
    if quantiles is None:
        sparse = min(SPARSE_LAYERS, layers)
        return (SPARSITY,) * sparse + (0.0,) * (layers - sparse)
    if not isinstance(quantiles, np.ndarray) or len(quantiles) < layers:
        raise meta.refuse(key, "no list of as many numbers", f"one for each of {layers} layers")
    shares = [round(NormalDist().cdf(float(quantile)), 6) for quantile in quantiles[:layers]]
    if not all(0 <= share < 1 for share in shares):
        raise meta.refuse(key, "beyond the normal distribution's", "quantiles of shares below 1")
    return tuple(shares) if any(shares) else ()


def _rotary_pairs(meta: Metadata, head_dim: int) -> int:
    """Pairs of a full layer's head that turn: the others have an endless factor."""
    factors = meta.file.tensors.get("rope_freqs.weight")
    if factors is None:
        return head_dim // 2
    values = read_rows(factors, 0, factors.shape[0])
    turn = int((values < TURNS_NOT).sum())
    if values.shape != (head_dim // 2,) or (values[:turn] != 1).any():
        raise CheckpointError(
            f"{factors.where}: factors other than 1 in front and endless behind are not supported"
        )
    return turn


def _experts(meta: Metadata) -> Experts | None:
    count = meta.integer("expert_count", 0, least=0)
    if count == 0:
        return None
    return Experts(
        count=count,
        active=meta.integer("expert_used_count", most=count),
        intermediate_size=meta.integer("expert_feed_forward_length"),
    )


Read = Callable[[Metadata], GemmaConfig]
GEMMA4 = GgufDefaults(
    window=512,
    pattern=6,
    scaled_layers=None,
    local_theta=1e4,
    attn_softcap=None,
    final_softcap=0.0,
    linear_rope=False,
    post_norms=True,
    qk_norm=True,
)
NEWER: Mapping[str, tuple[GgufDefaults, Read]] = {
    "gemma3n": (replace(GEMMA4, pattern=5), read_gemma3n),
    "gemma4": (GEMMA4, read_gemma4),
}
