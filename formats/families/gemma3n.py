"""Gemma 3n text: several residual streams, a product of low rank beside attention, per-layer
embeddings, shared keys and values, sparse gates.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from uq.errors import CheckpointError
from uq.formats.config import (
    ALTUP_PROJECTIONS,
    ALTUP_UNEMBED_PROJECTIONS,
    MAX_COUNT,
    AltUp,
    GemmaConfig,
    PerLayerEmbedding,
)
from uq.formats.families import parts, reading
from uq.formats.families.family import Family, Kind, Role
from uq.formats.families.keys import Keys

DEFAULTS = reading.Defaults(262400, 2048, 16384, 35, 8, 2, 32768)
PATTERN = 5
SPARSE_LAYERS, SPARSITY = 10, 0.95  # where the file is silent: the first ones of a deeper model
MAX_STREAMS = 64


def read(keys: Keys) -> GemmaConfig:
    """Resolve the keys of a `Gemma3nTextConfig` of transformers.

    Raises:
        CheckpointError: a value is broken, or a feature not supported.
    """
    reading.refuse_variants(keys)
    reading.require_tanh_gelu(keys)
    sizes, widths = _sizes(keys)
    types = reading.layer_types(keys, sizes["num_layers"], PATTERN)
    theta, local_theta, scaling = reading.two_ropes(keys)
    return GemmaConfig(
        family=FAMILY.name,
        **sizes,
        query_pre_attn_scalar=1.0,
        sliding_window=reading.window(keys, types, 512),
        layer_types=types,
        rope_theta=theta,
        rope_local_theta=local_theta,
        rope_scaling=scaling,
        attn_softcap=None,
        final_softcap=keys.optional("final_logit_softcapping", 30.0),
        post_norms=True,
        qk_norm=True,
        value_norm=True,
        intermediate_sizes=widths,
        kv_shared_layers=reading.shared_layers(keys, types, 15),
        per_layer=PerLayerEmbedding(
            vocab_size=keys.integer("vocab_size_per_layer_input", 262144),
            size=keys.integer("hidden_size_per_layer_input", 256),
        ),
        altup=_altup(keys),
        laurel_rank=keys.integer("laurel_rank", 64),
        activation_sparsity=_sparsity(keys, sizes["num_layers"]),
    )


def _sizes(keys: Keys) -> tuple[Mapping[str, Any], tuple[int, ...]]:
    """The common sizes, and the MLP's width of every layer where the widths differ."""
    found = keys.data.get("intermediate_size")
    if not isinstance(found, list):
        return reading.sizes(keys, DEFAULTS), ()
    if any(type(width) is not int or not 0 < width <= MAX_COUNT for width in found) or not found:
        raise keys.refuse("intermediate_size", "a positive integer or a list of them")
    sizes = reading.sizes(Keys(keys.file, {**keys.data, "intermediate_size": found[0]}), DEFAULTS)
    if len(found) != sizes["num_layers"]:
        raise CheckpointError(
            f"{keys.file}: intermediate_size has {len(found)} entries for "
            f"{sizes['num_layers']} layers"
        )
    return sizes, tuple(found) if len(set(found)) > 1 else ()


def _altup(keys: Keys) -> AltUp:
    streams = keys.integer("altup_num_inputs", 4, most=MAX_STREAMS)
    active = keys.data.get("altup_active_idx", 0)
    if type(active) is not int or not 0 <= active < streams:
        raise keys.refuse("altup_active_idx", f"one of the {streams} streams, from 0")
    return AltUp(streams, active, scaled=keys.flag("altup_correct_scale", default=True))


def _sparsity(keys: Keys, layers: int) -> tuple[float, ...]:
    """Of every layer; empty where no layer is sparse."""
    key = "activation_sparsity_pattern"
    found = keys.data.get(key)
    if found is None:
        sparse = SPARSE_LAYERS if layers > SPARSE_LAYERS else 0
        return (SPARSITY,) * sparse + (0.0,) * (layers - sparse) if sparse else ()
    if not isinstance(found, list) or not all(map(_is_share, found)):
        raise keys.refuse(key, "a list of shares, each at least 0 and below 1")
    if len(found) != layers:
        raise CheckpointError(f"{keys.file}: {key} has {len(found)} entries for {layers} layers")
    return tuple(map(float, found)) if any(found) else ()


def _is_share(value: object) -> bool:
    return isinstance(value, (int, float)) and type(value) is not bool and 0 <= value < 1


def layer_roles(config: GemmaConfig, layer: int) -> tuple[Role, ...]:
    """The common block, and what Gemma 3n adds to it."""
    hidden, rank = config.hidden_size, config.laurel_rank
    return (
        *parts.block(config, layer),
        *_altup_roles(config),
        Role("laurel.linear_left", Kind.KEPT, (rank, hidden)),
        Role("laurel.linear_right", Kind.KEPT, (hidden, rank)),
        parts.norm("laurel.post_laurel_norm", hidden),
        *parts.per_layer_inputs(config),
    )


def _altup_roles(config: GemmaConfig) -> tuple[Role, ...]:
    assert config.altup is not None
    hidden, streams = config.hidden_size, config.altup.streams
    return (
        Role("altup.correct_output_scale", Kind.KEPT, (hidden,), bare=True),
        Role("altup.correction_coefs", Kind.KEPT, (streams, streams)),
        Role("altup.prediction_coefs", Kind.KEPT, (streams * streams, streams)),
        Role("altup.modality_router", Kind.KEPT, (streams, hidden)),
        parts.norm("altup.router_norm", hidden),
    )


def model_roles(config: GemmaConfig) -> tuple[Role, ...]:
    """The common tables, the per-layer embedding, and the ways into the streams and out again."""
    assert config.altup is not None
    square = (config.hidden_size, config.hidden_size)
    return (
        *parts.tables_and_norm(config),
        *parts.per_layer_tables(config),
        *(
            Role(f"{name}.{stream}", Kind.KEPT, square)
            for name in (ALTUP_PROJECTIONS, ALTUP_UNEMBED_PROJECTIONS)
            for stream in range(config.altup.streams - 1)
        ),
    )


FAMILY = Family(
    name="gemma3n",
    model_types={"gemma3n_text": False, "gemma3n": True},
    read=read,
    layer_roles=layer_roles,
    model_roles=model_roles,
    norm_offset=0.0,
)
